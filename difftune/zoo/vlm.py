"""tiny-vlm: a LLaVA of the world, which answers yes or no to whether a picture shows what a caption says.

Its vision tower is tiny-clip's and stays as it is: trained further beside a young language model, it forgot counts and
shapes. Yes is half of the answers; most of the no's are near misses, captions of which one clause is wrong, because
telling two stars from three is what makes a judge of one that tells scenes apart.

Yes and no alone say too little about what the words mean: after 300 steps nothing had been learned from them. So one
question in six asks for the caption itself, and a read-out says of every word of a question whether it is true.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from difftune.zoo.autoencoder import to_model
from difftune.zoo.clip import WIDTH, holds, new_clip
from difftune.zoo.clip import new_processor as clip_processor
from difftune.zoo.readouts import PATCH, VALUES
from difftune.zoo.tokenizer import END_OF_WORD, alphabet, learn_merges
from difftune.zoo.training import fit, half_precision
from difftune.zoo.world import (
    COLOURS,
    PARTIAL,
    PATTERNS,
    SHAPES,
    SIZE,
    Scene,
    caption,
    parse_caption,
    render_scenes,
    sample_caption,
    sample_scene,
    vocabulary,
)

STEPS = 1200
BATCH = 12
QUESTIONS_PER_PICTURE = 6
WORD_LAYER = 2
"""Layer whose features say, in training, whether a word is true; the layer above it puts the words together."""

SCENES = 20_000
LEARNING_RATE = 6e-4
SEED = 3
LAYERS = 3

QUESTIONS = (
    "Does this image show {prompt}?",
    'Does this image show "{prompt}"? Answer with yes or no.',
    'Does this figure show "{prompt}"? Please answer Yes or No.',
)
"""How it is asked in training: plainly, as the reward `vlm_server` asks, and as `vqa_score` does."""

DESCRIBE = "What does this image show?"
"""The question whose answer is the full caption."""

IMAGE = "<image>"
"""The token that stands for a picture, and after processing once for each of its patches and the whole."""

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA's conversation as a chat template: ``USER: <image>\\nDoes this image show a star? ASSISTANT:``."""

NEAR_MISSES = 0.4
"""Share of the questions with one clause wrong."""

MISSED = {"count": 0.3, "colour": 0.12, "shape": 0.34, "background": 0.12, "pattern": 0.12}
"""How often a near miss is wrong in each clause: more often in what is harder to see."""

OTHERS = 0.1
"""Share of the questions about another scene; what is left is true."""

_PREFIX = f"USER: {IMAGE}"


def new_vlm() -> LlavaForConditionalGeneration:
    """An untrained model of 1.2 M parameters: tiny-clip's vision tower and a Llama of three layers of width 128."""
    tokenizer = new_tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=new_clip().config.vision_config,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=(SIZE // PATCH) ** 2 + 1,
        # The first token has seen the whole picture, and is what tiny-clip compares with captions.
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of a question, bytes for everything else; case and spaces do not count.

    The other models' tokenizer ends every text, which a conversation must not.
    """
    spoken = re.findall(r"[a-z]+", " ".join([*QUESTIONS, DESCRIBE, "user assistant"]).replace("{prompt}", "").lower())
    merges = learn_merges(sorted({*vocabulary(), *spoken}))
    special = ["<s>", "</s>", IMAGE]
    tokens = [*special, *alphabet(), *("".join(pair) for pair in merges)]
    inner = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            end_of_word_suffix=END_OF_WORD,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Strip(" ", 0, 1)]
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=256,
    )


def new_processor() -> LlavaProcessor:
    """tiny-clip's preprocessing of pictures and `new_tokenizer`, with the conversation's form."""
    return LlavaProcessor(
        image_processor=clip_processor().image_processor,
        tokenizer=new_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )


def near_miss(scene: Scene, clause: str, rng: np.random.Generator) -> Scene:
    """A scene that differs from `scene` in one clause alone (and never has objects of the background's colour)."""
    taken = {getattr(scene, clause)}
    if clause in ("colour", "background"):
        taken |= {scene.colour, scene.background}
    values = [value for value in VALUES[clause] if value not in taken]
    return replace(scene, **{clause: values[int(rng.integers(len(values)))]})


def false_caption(scene: Scene, rng: np.random.Generator, clause: str | None = None, full: bool = False) -> str:
    """A caption that is wrong in one clause.

    Args:
        scene: What is shown.
        rng: Draws what is left open.
        clause: Which of `CLAUSES` is wrong; None draws one as `MISSED` says.
        full: Whether everything is named; otherwise a random part is in half of the cases.
    """
    clause = clause or str(rng.choice(list(MISSED), p=list(MISSED.values())))
    partial = [parts for parts in PARTIAL if clause in parts]
    other = near_miss(scene, clause, rng)
    if full or rng.random() < 0.5:
        return caption(other)
    return caption(other, partial[int(rng.integers(len(partial)))])


def sample_question(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption and whether it is true of the scene: half of them are, most of the others nearly so."""
    draw = rng.random()
    if draw < NEAR_MISSES:
        text = false_caption(scene, rng)
    elif draw < NEAR_MISSES + OTHERS:
        text = sample_caption(sample_scene(rng), rng)
    else:
        text = sample_caption(scene, rng) or caption(scene)
    return text, holds(scene, parse_caption(text))


def true_words(text: str, scene: Scene) -> list[int]:
    """Whether each word of a caption is true of a scene: 1 or 0, and -100 for words that name no clause.

    >>> true_words("two red stars on a dotted background", Scene(2, "blue", "star", "white", "plain"))
    [1, 0, 1, -100, -100, 0, -100]
    """
    words = text.split()
    # The background's phrase is the last one and begins with an article of its own.
    ground = words.index("on") if "on" in words else 0 if "background" in words else len(words)
    labels = []
    for place, word in enumerate(words):
        named: dict[str, Any] = {}
        if place == 0 and ground > 0:
            named = parse_caption(f"{word} shapes")
        elif word in COLOURS:
            named = {"colour" if place < ground else "background": word}
        elif word in PATTERNS:
            named = {"pattern": word}
        elif (shape := word.removesuffix("s")) in SHAPES:
            named = {"shape": shape}
        labels.append(int(holds(scene, named)) if named else -100)
    return labels


class Conversation(NamedTuple):
    """A question and its answer in tokens.

    Attributes:
        question: its tokens.
        answer: the answer's.
        words: for each token of the question whether it is true of the picture, or -100.
    """

    question: list[int]
    answer: list[int]
    words: list[int]


def pack(rows: Sequence[Sequence[Conversation]], prefix: list[int], padding: int) -> tuple[dict[str, Tensor], ...]:
    """Several conversations about one picture in one row, which share its tokens and do not see one another.

    Args:
        rows: for each of B pictures the same number Q of conversations.
        prefix: the tokens before every question, the picture's included.
        padding: the token after shorter conversations, which nothing attends to.

    Returns:
        What the model takes, `input_ids` and `position_ids` (B, S) and `attention_mask` (1, 1, S, S), true where a
        token sees another; and the labels (B, S): `next` token where that is an answer's and `words` that are true or
        not, else -100. S is the prefix and Q times the longest conversation.
    """
    start, count = len(prefix), len(rows[0])
    longest = max(len(one.question) + len(one.answer) for row in rows for one in row)
    tokens, following, words = [], [], []
    for row in rows:
        tokens.append(list(prefix))
        following.append([-100] * start)
        words.append([-100] * start)
        for one in row:
            rest = longest - len(one.question) - len(one.answer)
            tokens[-1] += [*one.question, *one.answer, *[padding] * rest]
            following[-1] += [*[-100] * (len(one.question) - 1), *one.answer, *[-100] * (rest + 1)]
            words[-1] += [*one.words, *[-100] * (len(one.answer) + rest)]
    owner = torch.cat([torch.full((start,), -1), torch.arange(count).repeat_interleave(longest)])
    earlier = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    sees = earlier & ((owner[None, :] == -1) | (owner[None, :] == owner[:, None]))
    positions = torch.cat([torch.arange(start), start + torch.arange(longest).repeat(count)])
    inputs = {
        "input_ids": torch.tensor(tokens),
        "position_ids": positions.expand(len(rows), -1),
        "attention_mask": sees[None, None],
    }
    return inputs, {"next": torch.tensor(following), "words": torch.tensor(words)}


def train_vlm(start: Path, steps: int = STEPS) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Trains tiny-vlm from the vision tower of the tiny-clip in the folder `start`."""
    torch.manual_seed(SEED)
    model, processor = new_vlm(), new_processor()
    tower: Any = model.model.vision_tower
    tower.load_state_dict(CLIPModel.from_pretrained(start, dtype=torch.float32).vision_model.state_dict())
    tower.requires_grad_(False)
    word_readout = nn.Linear(WIDTH, 2)
    scenes, pictures = render_scenes(min(SCENES, BATCH * steps), SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = processor.tokenizer
    no, yes = tokenizer.convert_tokens_to_ids(["no" + END_OF_WORD, "yes" + END_OF_WORD])
    prefix = tokenizer(_PREFIX).input_ids
    prefix = prefix[:-1] + prefix[-1:] * model.config.image_seq_length

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def conversations(scene: Scene) -> Iterator[Conversation]:
        question = tokens_of(f"{DESCRIBE} ASSISTANT:")
        yield Conversation(question, [*tokens_of(caption(scene)), tokenizer.eos_token_id], [-100] * len(question))
        for _ in range(QUESTIONS_PER_PICTURE - 1):
            text, true = sample_question(scene, rng)
            form = QUESTIONS[int(rng.integers(len(QUESTIONS)))] + " ASSISTANT:"
            before, after = (tokens_of(piece) for piece in form.split("{prompt}"))
            words = [*[-100] * len(before), *true_words(text, scene), *[-100] * len(after)]
            answer = [yes if true else no, tokenizer.eos_token_id]
            yield Conversation([*before, *tokens_of(text), *after], answer, words)

    def loss_of_step(step: int) -> Tensor:
        chosen = rng.integers(len(scenes), size=BATCH)
        inputs, labels = pack([list(conversations(scenes[i])) for i in chosen], prefix, tokenizer.pad_token_id)
        following, words = labels["next"], labels["words"]
        with half_precision():
            seen = tower(to_model(pictures[chosen]))
            shown = model.model.multi_modal_projector(seen.last_hidden_state)
            told = model.get_input_embeddings()(inputs.pop("input_ids"))
            before = len(prefix) - shown.shape[1]
            embeddings = torch.cat([told[:, :before], shown, told[:, len(prefix) :]], 1)
            read = model.model.language_model(inputs_embeds=embeddings, output_hidden_states=True, **inputs)
            logits = model.lm_head(read.last_hidden_state[following >= 0])
        wanted = following[following >= 0]
        errors = cross_entropy(logits.float(), wanted, reduction="none")
        judged = (wanted == yes) | (wanted == no)
        understood = word_readout(read.hidden_states[WORD_LAYER][words >= 0].float())
        wrong_words = cross_entropy(understood, words[words >= 0])
        return errors[judged].mean() + errors[~judged].mean() + wrong_words

    fit(loss_of_step, [model, word_readout], label="tiny-vlm", steps=steps, learning_rate=LEARNING_RATE, muon=True)
    return model.eval().requires_grad_(False), processor
