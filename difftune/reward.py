"""The reward contract: images and prompts in, one checked score per sample out.

A reward is a function or a class. The function form is what users write::

    @reward("redness", differentiable=True)
    def redness(images, prompts):            # (B, 3, H, W) in [0, 1], list of B str
        return images[:, 0].mean((1, 2))     # (B,), higher is better

The class form has settings and weights: it subclasses :class:`Reward`, takes its settings in ``__init__`` and
implements :meth:`Reward.score`. Both are registered by :func:`reward` and built by :func:`build_reward`. What a
scorer returns is checked once, here: shape, dtype and finiteness, with the scorer and the sample in the message.

A scorer declares what it can do and what it needs (gradients, groups, video, metadata beside the prompt, weights and
their licence), so that a run that asks for more stops with one line before anything is trained.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor, nn

from difftune.registry import Registry
from difftune.types import NonFiniteError, RewardOutput, UserError

#: What a scorer may return: scores ``(B,)``, a mapping of named parts (their mean is the total), or the full record.
Scores = Tensor | Sequence[float] | Mapping[str, Any] | RewardOutput


class Reward(ABC):
    """A scorer: ``reward(images, prompts) -> RewardOutput``.

    Subclasses implement :meth:`score`; calling the object adds the common checks. Class attributes declare what the
    scorer can do, so that an algorithm that needs more is refused before the run starts.

    Attributes:
        name: the registered name, set by the decorator.
        differentiable: scores carry gradients to the pixels (needed by reward-gradient algorithms).
        groupwise: the score of a sample depends on the other samples of its prompt.
        video: takes ``(B, F, 3, H, W)`` frames itself; the frames of the others' videos are scored one by one, and
            the mean over the frames counts.
        needs: metadata that every sample must have: name to what it is.
        range: the scores' range in words, e.g. ``[0, 1]``.
        weights: where the weights come from, empty when there are none.
        licence: licence of the weights, empty when there are none.
        memory: what the weights take, without activations; empty when there are none.
        settings: the settings the scorer was built with, as far as they were given.
    """

    name: ClassVar[str] = "unnamed"
    differentiable: ClassVar[bool] = False
    groupwise: ClassVar[bool] = False
    video: ClassVar[bool] = False
    needs: ClassVar[Mapping[str, str]] = MappingProxyType({})
    range: ClassVar[str] = ""
    weights: ClassVar[str] = ""
    licence: ClassVar[str] = ""
    memory: ClassVar[str] = ""
    settings: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """Score ``images`` ``(B, 3, H, W)`` in [0, 1] (frames: ``(B, F, 3, H, W)``) made for ``B`` prompts.

        ``metadata`` has one mapping per sample, empty unless the prompt file carries some. What :attr:`needs` names
        is there; where the samples are drawn under conditions beside the text, ``conditions`` is their digest. Those
        of equal text and conditions are one prompt's (:func:`difftune.prompts.told_apart`).
        """

    def modules(self) -> list[nn.Module]:
        """Return the networks the scorer holds (moved to the run's device, parked on the CPU when idle)."""
        return [value for value in vars(self).values() if isinstance(value, nn.Module)]

    def to(self, device: torch.device | str) -> Reward:
        """Move the scorer's networks to ``device`` and return it."""
        for module in self.modules():
            module.to(device)
        return self

    def describe(self) -> str:
        """Return the scorer in words, with the settings that were given; what it is made of is indented below it."""
        # What a composed reward is made of is told by the terms themselves.
        given = ", ".join(f"{key}: {value}" for key, value in self.settings.items() if key != "of")
        return f"{self.name} {{{given}}}" if given else self.name

    def state_dict(self) -> dict[str, Any]:
        """Return what scoring has changed and a resumed run must have back, as plain JSON values; empty for most.

        What keeps a state must see all samples: of several processes the first scores everyone's, and the others are
        given its state.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned.

        Raises:
            UserError: the state is of another reward.
        """
        if state:
            raise UserError(f"reward {self.name!r}: got a state with {', '.join(state)}, expected none")

    def collect(self) -> Any:
        """Hand over what was seen while gradients were asked for and is not in the state yet; ``None`` for most.

        Within an optimizer step the scores must not depend on how its samples are cut into micro-batches and
        processes, so what would change them is kept back, handed over as plain values, and taken in by
        :meth:`settle`. After this call nothing is kept back.
        """
        return None

    def settle(self, found: Sequence[Any]) -> None:
        """Take in what :meth:`collect` has returned in an optimizer step, in all processes; most do nothing.

        Those that returned ``None`` are left out. What comes of it must not depend on the order or number of the rest.
        """
        return

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Begin on samples that a later call will score among others, if the work is done elsewhere; most do nothing.

        That call's scores are the same as without. :meth:`drop` ends what no call has asked for.
        """
        return

    def drop(self) -> None:
        """Give up what was begun; nothing waits for it any more."""
        return

    def check_metadata(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Check that every sample has the metadata the scorer :attr:`needs`; a run may ask before it starts.

        Raises:
            UserError: one is missing; the message names the scorer, the metadata and the prompt.
        """
        for index, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True)):
            for key, meaning in self.needs.items():
                if extra.get(key) is None:
                    raise UserError(
                        f"reward {self.name!r} needs {key!r} ({meaning}) in the metadata of every prompt, and sample "
                        f"{index} (prompt {prompt!r}) has none; put it beside the prompt in the prompt file"
                    )

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardOutput:
        """Score a batch and check what came back.

        Args:
            images: ``(B, 3, H, W)`` or ``(B, F, 3, H, W)`` floats in [0, 1].
            prompts: ``B`` strings.
            metadata: ``B`` mappings, or ``None``.

        Raises:
            UserError: images or scores have the wrong shape, range or type, metadata that the scorer needs is missing,
                or scores that should carry gradients to the pixels do not; the message names the scorer.
            NonFiniteError: a score is NaN or infinite; the message names scorer, sample and prompt.
        """
        prompts = list(prompts)
        _check_images(self.name, images, len(prompts))
        extra = [{}] * len(prompts) if metadata is None else list(metadata)
        if len(extra) != len(prompts):
            raise UserError(
                f"reward {self.name!r}: got {len(extra)} metadata records for {len(prompts)} prompts, expected one "
                "each; give a mapping per prompt, an empty one where there is none"
            )
        self.check_metadata(prompts, extra)
        with contextlib.nullcontext() if self.differentiable else torch.no_grad():
            pictures = images if self.differentiable else images.detach()
            out = self._scored(pictures, prompts, extra)
            if pictures.requires_grad and torch.is_grad_enabled() and not out.total.requires_grad:
                self._require_constant(out, pictures, prompts, extra)
            return out

    def _scored(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        if images.ndim == 5 and not self.video:
            return self._over_frames(images, prompts, metadata)
        return checked_output(self.name, self.score(images, prompts, metadata), prompts)

    def _require_constant(
        self, out: RewardOutput, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> None:
        """Refuse scores without a graph unless the pixels do not matter to them (no text is wanted, say)."""
        if self.state_dict():
            return  # another look would teach it; the terms of a combination have been checked by themselves
        with torch.no_grad():
            # Mirrored and greyer: what looks at the pixels at all sees another picture.
            other = self._scored(0.3 + 0.4 * images.detach().flip(-1), prompts, metadata)
        if not torch.equal(other.total, out.total):
            raise UserError(
                f"reward {self.name!r} is declared differentiable, but its scores carry no gradient to the pixels: "
                "compute them with torch alone (no .item(), float(), numpy() or detach()), or declare it without "
                "differentiable"
            )

    def _over_frames(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score frame after frame, each with the same frame of the other samples, and average."""
        if images.shape[1] == 0:
            raise UserError(
                f"reward {self.name!r} got images {tuple(images.shape)}: videos without frames, expected at least one"
            )
        return mean_output(
            [checked_output(self.name, self.score(frame, prompts, metadata), prompts) for frame in images.unbind(1)]
        )


def _check_images(name: str, images: Tensor, batch: int) -> None:
    if not isinstance(images, Tensor) or images.ndim not in (4, 5) or images.shape[-3] != 3:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(
            f"reward {name!r} got images {got}, expected a tensor (B, 3, H, W) or, for video, (B, F, 3, H, W); "
            "permute or convert them first"
        )
    if not images.is_floating_point():
        raise UserError(f"reward {name!r} got {images.dtype} images, expected floats in [0, 1]: divide by 255")
    if len(images) != batch:
        raise UserError(f"reward {name!r} got {len(images)} images for {batch} prompts, expected a prompt per image")
    if images.numel() == 0:
        return
    low, high = torch.aminmax(images.detach())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise UserError(
            f"reward {name!r} got images in [{float(low):.3g}, {float(high):.3g}], expected [0, 1]; rescale them first"
        )


def mean_output(outputs: Sequence[RewardOutput], weights: Sequence[float] | None = None) -> RewardOutput:
    """Return the weighted mean of outputs for the same samples; equal weights by default.

    Errors of the frames of one video are not independent, so the mean of their standard deviations, which is an upper
    bound, is the mean's.
    """
    shares = [1 / len(outputs)] * len(outputs) if weights is None else [w / sum(weights) for w in weights]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return sum((share * value for share, value in zip(shares, values, strict=True)), torch.zeros_like(values[0]))

    known = [out.uncertainty for out in outputs if out.uncertainty is not None]
    return RewardOutput(
        mean([out.total for out in outputs]),
        {key: mean([out.parts[key] for out in outputs]) for key in outputs[0].parts},
        mean(known) if len(known) == len(outputs) else None,
    )


def checked_output(name: str, scores: Scores, prompts: Sequence[str]) -> RewardOutput:
    """Turn what a scorer returned into a :class:`RewardOutput` of fp32 tensors on one device, or say what is wrong.

    Integers and bf16 become fp32; a mapping of parts gets the mean of its parts as the total. Tuples are refused:
    two scores for two samples cannot be told from a pair (reward, metadata).

    Raises:
        UserError: the scorer, which is often the user's own, returned something else than a score per sample.
        NonFiniteError: a score is NaN or infinite.
    """
    if isinstance(scores, RewardOutput):
        total, parts, uncertainty = scores.total, dict(scores.parts), scores.uncertainty
    elif isinstance(scores, Mapping):
        if not scores:
            raise UserError(f"reward {name!r} returned no parts, expected at least one named (B,) score; return one")
        parts = {key: _as_scores(f"{name}/{key}", value, prompts) for key, value in scores.items()}
        total, uncertainty = torch.stack(list(parts.values())).mean(0), None
    elif isinstance(scores, tuple):
        raise UserError(
            f"reward {name!r} returned a tuple of {len(scores)}, expected a tensor of {len(prompts)} scores, "
            "a dict of named parts or a RewardOutput; return the scores alone"
        )
    else:
        total, parts, uncertainty = _as_scores(name, scores, prompts), {}, None
    total = _as_scores(name, total, prompts)
    parts = {key: _as_scores(f"{name}/{key}", value, prompts) for key, value in parts.items()}
    if uncertainty is not None:
        uncertainty = _as_scores(f"{name}/uncertainty", uncertainty, prompts)
    return RewardOutput(total, parts, uncertainty)


def _as_scores(name: str, value: Any, prompts: Sequence[str]) -> Tensor:
    try:
        scores = value if isinstance(value, Tensor) else _as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"reward {name!r} returned {type(value).__name__}, expected {len(prompts)} numbers ({reason}); return a "
            "tensor or a list of them"
        ) from None
    if scores.shape != (len(prompts),):
        raise UserError(
            f"reward {name!r} returned shape {tuple(scores.shape)}, expected ({len(prompts)},): one score per sample; "
            "reduce every other dimension, e.g. images.mean((1, 2, 3))"
        )
    if scores.is_complex():
        raise UserError(f"reward {name!r} returned {scores.dtype}, expected real numbers; return the real part")
    scores = scores.float()
    finite = torch.isfinite(scores.detach())
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise NonFiniteError(
            f"reward {name!r} gave {float(scores.detach()[bad])} for sample {bad} "
            f"(prompt {prompts[bad]!r}); the run stops before the update, the last checkpoint is intact"
        )
    return scores


def _as_tensor(value: Any) -> Tensor:
    """Return numbers as a tensor; a list that holds tensors keeps their graphs, which ``torch.as_tensor`` cuts."""
    if not isinstance(value, Sequence) or not any(isinstance(item, Tensor) for item in value):
        return torch.as_tensor(value)
    device = next(item.device for item in value if isinstance(item, Tensor))
    rows = [torch.as_tensor(item, device=device) for item in value]
    return torch.stack([row.reshape(()) if row.numel() == 1 else row for row in rows])


class FunctionReward(Reward):
    """A reward made of a plain function ``f(images, prompts[, metadata])``."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Scores],
        differentiable: bool,
        declared: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.name = name  # type: ignore[misc]
        self.differentiable = differentiable  # type: ignore[misc]
        for key, value in (declared or {}).items():
            setattr(self, key, value)
        self._function = function
        self._settings = settings
        parameters = inspect.signature(function).parameters
        self._takes_metadata = "metadata" in parameters

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """Call the function; ``metadata`` is passed when it has a parameter of that name."""
        extra = {"metadata": metadata} if self._takes_metadata else {}
        return self._function(images, prompts, **extra, **self._settings)


Builder = Callable[..., Reward]

REWARDS: Registry[Builder] = Registry("reward", "difftune.rewards", "difftune.rewards")

F = TypeVar("F", bound=Callable[..., Any])


def reward(
    name: str,
    *,
    differentiable: bool = False,
    groupwise: bool = False,
    video: bool = False,
    needs: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Register a function ``f(images, prompts) -> (B,)`` or a :class:`Reward` subclass under ``name``.

    Args:
        name: what the YAML and :func:`build_reward` call it.
        differentiable: for functions, whether the scores carry gradients to the pixels (a class says so itself).
        groupwise: for functions, whether a score depends on the other samples of its prompt.
        video: for functions, whether they take frames ``(B, F, 3, H, W)`` themselves.
        needs: for functions, the metadata that every sample must have, name to what it is.

    Further keyword parameters of the function, or the parameters of the class's ``__init__``, are its settings:
    ``reward: {name: redness, threshold: 0.3}``.
    """

    def register(target: F) -> F:
        origin = f"{target.__module__}.{target.__qualname__}"
        if inspect.isclass(target):
            if not issubclass(target, Reward):
                raise TypeError(f"@reward({name!r}) got class {target.__name__}, expected a subclass of Reward")
            target.name = name
            REWARDS.add(name, target, origin)
        else:
            declared = {"groupwise": groupwise, "video": video, "needs": MappingProxyType(dict(needs or {}))}
            REWARDS.add(name, _function_builder(name, target, differentiable, declared), origin)
        return target

    return register


def _function_builder(
    name: str, function: Callable[..., Scores], differentiable: bool, declared: Mapping[str, Any]
) -> Builder:
    def build(**settings: Any) -> Reward:
        return FunctionReward(name, function, differentiable, declared, **settings)

    build.__doc__ = function.__doc__
    build.__wrapped__ = function  # type: ignore[attr-defined]
    return build


class ComposedReward(Reward):
    """A reward made of others, its *terms*: their parts are logged, their networks, needs and states are its own.

    Attributes:
        terms: ``(label, weight, reward)`` triples; labels are unique.
    """

    def __init__(self, terms: Sequence[tuple[str, float, Reward]]) -> None:
        if not terms:
            raise UserError("reward: got an empty list, expected at least one reward")
        self.terms = list(terms)
        self.differentiable = all(r.differentiable for _, _, r in terms)  # type: ignore[misc]
        self.groupwise = any(r.groupwise for _, _, r in terms)  # type: ignore[misc]
        # Frames are passed on: each term takes them as it can.
        self.video = True  # type: ignore[misc]
        self.needs = {key: meaning for _, _, r in terms for key, meaning in r.needs.items()}  # type: ignore[misc]

    def modules(self) -> list[nn.Module]:
        """Return the networks of all terms, each once."""
        found = {id(module): module for _, _, term in self.terms for module in term.modules()}
        return list(found.values())

    def to(self, device: torch.device | str) -> Reward:
        """Move all terms to ``device`` and return it."""
        for _, _, term in self.terms:
            term.to(device)
        return self

    def describe(self) -> str:
        """Return the tree, one term per line with its weight."""
        lines = [super().describe()]
        for _, weight, term in self.terms:
            first, *rest = term.describe().splitlines()
            lines += [f"  {weight:g} x {first}", *(f"  {line}" for line in rest)]
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the terms that have one, by label."""
        states = {label: term.state_dict() for label, _, term in self.terms}
        return {label: state for label, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give every term its state back."""
        known = {label: term for label, _, term in self.terms}
        for label in state:
            if label not in known:
                raise UserError(f"reward {self.name!r}: got a state of {label!r}, expected {', '.join(known)}")
        for label, term in known.items():
            term.load_state_dict(state.get(label, {}))

    def collect(self) -> Any:
        """Hand over what the terms have kept back, by label; ``None`` where that is nothing."""
        found = {label: term.collect() for label, _, term in self.terms}
        return {label: kept for label, kept in found.items() if kept is not None} or None

    def settle(self, found: Sequence[Any]) -> None:
        """Let every term take in its own."""
        for label, _, term in self.terms:
            term.settle([one[label] for one in found if label in one])

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Let all terms begin."""
        for _, _, term in self.terms:
            term.begin(images, prompts, metadata)

    def drop(self) -> None:
        """Let all terms give up what they began."""
        for _, _, term in self.terms:
            term.drop()

    def score_terms(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[list[RewardOutput], dict[str, Tensor]]:
        """Return every term's output, and the parts: totals under ``label``, parts under ``label/part``."""
        outputs = [term(images, prompts, metadata) for _, _, term in self.terms]
        parts: dict[str, Tensor] = {}
        for (label, _, _), out in zip(self.terms, outputs, strict=True):
            parts[label] = out.total
            parts.update({f"{label}/{key}": value for key, value in out.parts.items()})
        return outputs, parts


class WeightedReward(ComposedReward):
    """A weighted sum of rewards; the parts are logged unweighted, under the names of the rewards.

    With ``terms`` an algorithm can normalise each reward before it adds them up (GDPO): ``parts[label]`` are its
    scores and ``weight`` its share.

    Attributes:
        terms: ``(label, weight, reward)`` triples.
    """

    name = "weighted"

    def __init__(self, terms: Sequence[tuple[str, float, Reward]]) -> None:
        super().__init__(terms)
        self.name = " + ".join(label for label, _, _ in terms)  # type: ignore[misc]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``sum_i weight_i * total_i`` with every term's total and parts under ``label`` and ``label/part``.

        Uncertainties add up as those of independent scorers do: ``sigma^2 = sum_i (weight_i sigma_i)^2``, over the
        terms that know theirs.
        """
        outputs, parts = self.score_terms(images, prompts, metadata)
        total: Tensor | None = None
        variance: Tensor | None = None
        for (_, weight, _), out in zip(self.terms, outputs, strict=True):
            total = weight * out.total if total is None else total + weight * out.total
            if out.uncertainty is not None:
                square = (weight * out.uncertainty) ** 2
                variance = square if variance is None else variance + square
        assert total is not None
        return RewardOutput(total, parts, None if variance is None else variance.sqrt())


@overload
def build_reward(spec: str, **settings: Any) -> Reward: ...
@overload
def build_reward(spec: Mapping[str, Any] | Sequence[Any] | Reward) -> Reward: ...


def build_reward(spec: Any, **settings: Any) -> Reward:
    """Build a reward from what a config may say.

    Args:
        spec: a registered name; ``{name: NAME, weight: 1.0, ...settings}``; a list of either, summed with their
            weights; or a :class:`Reward`, returned as it is.
        settings: the scorer's settings, with a name only.

    Raises:
        RegistryError: unknown name (with the nearest one).
        UserError: unknown or missing settings.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        return _build(spec, settings)
    if isinstance(spec, Mapping):
        ((label, weight, one),) = build_terms([spec])
        return one if weight == 1.0 else WeightedReward([(label, weight, one)])
    if isinstance(spec, Sequence):
        return WeightedReward(build_terms(spec))
    raise UserError(f"reward: got {type(spec).__name__}, expected a name, a mapping with a name, or a list of them")


def build_terms(specs: Any) -> list[tuple[str, float, Reward]]:
    """Build the terms of a composed reward: ``(label, weight, reward)``, equal names told apart by underscores.

    Args:
        specs: what :func:`build_reward` takes in a list: names, mappings with a name, rewards; or one of them.
    """
    items = [specs] if isinstance(specs, str | Mapping | Reward) else list(specs)
    terms: list[tuple[str, float, Reward]] = []
    for item in items:
        weight = 1.0
        if isinstance(item, Reward):
            one = item
        elif isinstance(item, str | Mapping):
            entry = {"name": item} if isinstance(item, str) else dict(item)
            weight = float(entry.get("weight", 1.0))
            one = _build(_name_of(entry), {k: v for k, v in entry.items() if k not in ("name", "weight")})
        else:
            one = build_reward(item)
        label = one.name
        while any(label == taken for taken, _, _ in terms):
            label += "_"
        terms.append((label, weight, one))
    return terms


def _name_of(spec: Mapping[str, Any]) -> str:
    if not isinstance(spec.get("name"), str):
        raise UserError(f"reward: {dict(spec)!r} has no name, expected e.g. {{name: clip_score, weight: 1.0}}")
    return spec["name"]


def _build(name: str, settings: Mapping[str, Any]) -> Reward:
    builder = REWARDS.get(name)
    allowed = reward_settings(name)
    for key in settings:
        if key not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise UserError(f"reward {name!r} has no setting {key!r} (its settings: {known})")
    missing = [k for k, p in allowed.items() if p.default is inspect.Parameter.empty and k not in settings]
    if missing:
        raise UserError(f"reward {name!r} needs {', '.join(missing)}: add it beside the name")
    built = builder(**settings)
    built.settings = dict(settings)
    return built


def reward_settings(name: str) -> dict[str, inspect.Parameter]:
    """Return the settings of the reward ``name``: parameter name to its signature entry (default, annotation)."""
    builder = REWARDS.get(name)
    function = getattr(builder, "__wrapped__", None)
    if function is None:
        parameters = dict(inspect.signature(builder).parameters)
    else:
        parameters = dict(inspect.signature(function).parameters)
        for given in list(parameters)[:2] + ["metadata"]:
            parameters.pop(given, None)
    return {
        key: p
        for key, p in parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }


def list_rewards() -> list[str]:
    """Return the names of all rewards, built-in, installed and plugged in."""
    return list(REWARDS)
