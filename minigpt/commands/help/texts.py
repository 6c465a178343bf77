"""Paragraphs that --help shows below a command's docstring, on options of other rings."""

TEXTS = {
    "train": """
With --from, the model's shape and tokenizer stay unchanged, --context-length sets only the length
of training sequences, and the defaults suit fine-tuning: AdamW, low learning rates, few steps.

On several GPUs: torchrun --nproc-per-node N -m minigpt train ...

Defaults in brackets are those of the preset nano.
""",
    "generate": r"""
Several samples are decoded as a batch; sample i equals the one that --seed SEED+i generates alone.

The text of --force comes first, as if it had been sampled: its tokens count toward
--max-new-tokens, and --logprobs shows their probabilities. Sampling continues after it.

With --interactive, the text continues from each typed line. A line that ends with \ continues
on the next one, and pasted lines are one text; an empty line lets the model continue. Ctrl-C
stops an answer. On a terminal, lines are edited with readline, and their history is kept in the
cache folder.

With --chat, the prompt and each typed line are user messages to an instruction-tuned model,
formatted with the chat template in its folder, and an answer ends with the model's end-of-turn
token. Special tokens in a message are plain text. With --overflow slide, a full context window
drops the oldest turns.
""",
    "attention-trace": r"""
--measure norm weights each source by the norm of the heads' contribution from it. logit, gradient
and integrated attribute the logit of the token, in signed logits: the heads' direct contributions
from each position, gradient x input, and integrated gradients.

The attention of a token is the row of the query that produced it, at the position before it,
so a token is not among its own sources. Attention weight is not influence: it shows where a
head looked, not why the token was generated. --n-verified measures influence: it hides the key
of a source from that query in all layers, so that the other weights are renormalized, or with
--knockout value zeroes its value and keeps the weights. As a control, it does the same at a
nearby position.

--prompt-rows also shows the tokens of the prompt, from the second one on, with their
probabilities, and --max-new-tokens 0 shows nothing else. The text of --force comes
first, as if it had been sampled, and counts toward --max-new-tokens. The probabilities of
--candidates are the model's own, before any sampling option.

--ablate sets the output of heads, before W_O, to 0, or with --ablate-mean to its mean over the
prompt; --patch replaces it, at --patch-position, with the output in a run on the prompt of
--patch-from, which must have the same number of tokens. --diff compares two such traces.

With --chat, the prompt is a user message, formatted with the model's chat template, whose
special tokens are sources like all others.

--svg and --png need matplotlib: pip install 'minigpt-attention[plot]'.

In a token, ␣ is a space, \n a line break, and \xe2 a byte that is not valid text. If
several tokens share a character, the first shows it, as 日, and the others continue it, as ⋯日;
--json has the bytes of each.
""",
}
"""Command -> paragraphs."""
