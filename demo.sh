#!/bin/sh
# What minigpt does, end to end: a tale and its trace from the model that ships, then a model of
# one's own after a minute of training, its text and its trace.
set -e
minigpt=${1:-minigpt}
name=demo-$(date +%Y%m%d-%H%M%S)
page=$name.html
prompt='Once upon a time'

say() { printf '\n\033[1m%s\033[0m\n' "$1"; }
[ -t 1 ] && [ -z "$NO_COLOR" ] || say() { printf '\n%s\n' "$1"; }

run() {
    printf '\n$ minigpt'
    for word; do case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac; done
    printf '\n'
    "$minigpt" "$@"
}

say '1. The model that ships tells a tale'
run generate --model storyteller --seed 2 --max-new-tokens 120 --ignore-eos "$prompt"

say '2. What each of its tokens looked at'
run attention-trace --model storyteller --seed 2 --max-new-tokens 24 --ignore-eos --html "$page" "$prompt"
cat <<END

How to read this:
  Each line is a new token; p is the probability that the model gave it.
  The rest of the line is where its attention heads looked, on average: 100 % a line.
  sink is the first position. Heads put there what they have no use for.
  Then come the tokens that got the most attention, each with its position and share.
  Few bits mean that the attention is on few tokens; many bits, that it is spread out.
  A look is not a reason: add --n-verified 2 to see what changes without a token.
The same as a page to click through: $page
END

say '3. A model of your own: one minute on 150 tales'
run train --name "$name" --tokenizer bpe:512 --max-minutes 1
run generate --model "$name" --seed 1 --max-new-tokens 80 --temperature 0.7 --ignore-eos "$prompt"
run attention-trace --model "$name" --seed 1 --max-new-tokens 12 --temperature 0.7 --ignore-eos "$prompt"

say 'Next: your own text, . .venv/bin/activate, then minigpt train FILE (docs/tutorial.md)'
