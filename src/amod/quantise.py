"""int8 by the runtimes' own tools: an exported file is replaced by its quantised self."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from amod.errors import UserError, one_line
from amod.runtimes import openvino_core


def quantise(path: Path, form: str, images: Tensor) -> None:
    """Quantise weights and activations, the latter's ranges from ``images`` (B, C, H, W), in place."""
    try:
        (_onnx if form == "onnx" else _openvino)(path, images)
    except Exception as error:  # whatever the tool cannot do with the graph
        raise UserError(f"int8: {form}'s quantiser fails on this model ({one_line(error)})") from error


def _onnx(path: Path, images: Tensor) -> None:
    """The products with weights; those of queries, keys and values are between activations and stay float."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images.numpy())

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )
    prepared.unlink()


def _openvino(path: Path, images: Tensor) -> None:
    import nncf
    import openvino

    model = openvino_core().read_model(path)
    data = nncf.Dataset(images.unsqueeze(1).numpy())
    made = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    new = path.with_stem(f"{path.stem}-quantised")  # the file itself is mapped while it is read
    openvino.save_model(made, new, compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        new.with_suffix(suffix).replace(path.with_suffix(suffix))
