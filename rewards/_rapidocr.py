"""The text reader of the package rapidocr-onnxruntime, on one thread."""

from __future__ import annotations

from typing import Any

from difftune.types import UserError


def reader(name: str, side: int) -> Any:
    """Return PP-OCRv4's detector and recogniser; upright text only.

    Args:
        name: the reward, for messages.
        side: the shorter side that a smaller picture is enlarged to, in pixels.

    Raises:
        UserError: ``side`` is below 32, the package is not installed, or OpenCV lacks a library of the system.
    """
    if side < 32:
        raise UserError(f"reward {name!r}: side is {side}, expected at least 32 pixels")
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise UserError(
            f"reward {name!r} needs rapidocr-onnxruntime ({str(error).splitlines()[0]}): install the extra, "
            "pip install 'difftune[ocr]'; where libGL is missing, pip install opencv-python-headless on top"
        ) from None
    return RapidOCR(det_limit_side_len=side, use_cls=False, intra_op_num_threads=1, inter_op_num_threads=1)
