"""Measures of a row other than the attention weight; ``--measure NAME`` finds them by name.

A measure is a module with one function, called once per trace:

    def measure(model: LanguageModel) -> Callable[[AttentionPass], Tensor]

It returns a function that receives the attention of every forward pass, in order, and returns the
last query's row of every head of the first sequence (L, H, S). A trace shows each row as shares of
its sum.
"""
