#!/bin/sh
# One condition at several scales, and in parts of the sampling: which does the picture need? Equal seed everywhere.
#
#     examples/sweep.sh MAP PROMPT OUT    (STEPS=20)
set -eu
map=$1 prompt=$2 out=$3

mkdir -p "$out"
{
    for scale in 0 0.5 1 1.5 2 1@0/0@.5 0@0/1@.5; do
        name=$(printf %s "$scale" | tr / _)
        printf '{"cond": "%s,scale=%s", "out": "%s/scale-%s.png"}\n' "$map" "$scale" "$out" "$name"
    done
    for mode in prompt control guess; do
        printf '{"cond": "%s", "mode": "%s", "out": "%s/mode-%s.png"}\n' "$map" "$mode" "$out" "$mode"
    done
} > "$out/jobs.jsonl"
controlnet generate --jobs "$out/jobs.jsonl" --prompt "$prompt" --seed 1 --steps "${STEPS:-20}" --skip-existing
