"""Checkpoint averaging, compared with a plain loop."""

from pathlib import Path

import pytest
import torch
from layout_models import LAYOUTS, make_model

from minigpt.checkpoint.model_folder import write_model
from minigpt.checkpoint.tools.averaging import average
from minigpt.errors import CheckpointError


@pytest.mark.integration
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_weights_equal_a_plain_mean(
    layout: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    models = []
    for number in range(3):
        model = make_model(259, layout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        models.append(model.to(dtype))
        write_model(tmp_path / str(number), model, None)
    mean = average([tmp_path / str(number) for number in range(3)]).model
    for name, tensor in mean.state_dict().items():
        expected = sum(model.state_dict()[name].double() for model in models) / 3
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_models_of_different_shapes_are_not_averaged(tmp_path: Path) -> None:
    write_model(tmp_path / "a", make_model(259, "llama-grouped"), None)
    write_model(tmp_path / "b", make_model(260, "llama-grouped"), None)
    with pytest.raises(CheckpointError, match=r"b' has a different config from '.*a'\. Average"):
        average([tmp_path / "a", tmp_path / "b"])
