"""torch.compile captures the whole model as one graph, even while the context grows."""

from typing import Any

import pytest
import torch
from small_models import LAYOUTS, small_config

from minigpt.model.gpt import GPT


@pytest.mark.integration
@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_warm_up_causes_no_graph_breaks(layout: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = GPT(small_config(layout)).train()
    compiled: Any = torch.compile(model, backend=keep, fullgraph=True)
    for n_rows, length in ((12, 8), (12, 8), (4, 24), (4, 24)):
        tokens = torch.ones(n_rows, length, dtype=torch.long)
        torch.testing.assert_close(compiled(tokens, recompute=False), model(tokens))
    # One graph for the short context and one for all others.
    assert len(graphs) <= 2
    torch._dynamo.reset()
