#!/bin/sh
# The main job, end to end: text in, checkpoint out, text out, and what it attended to.
set -e
minigpt=${1:-minigpt}
name=demo-$(date +%Y%m%d-%H%M%S)
prompt='Once upon a time'

run() {
    printf '\n$ minigpt'
    for word; do case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac; done
    printf '\n'
    "$minigpt" "$@"
}

run train --name "$name" --tokenizer bpe:512 --max-minutes 1
run generate --model "$name" --max-new-tokens 160 --temperature 0.6 --seed 1 "$prompt"
run attention-trace --model "$name" --max-new-tokens 24 --temperature 0.6 --seed 1 "$prompt"
