#!/bin/sh
# A folder of photos: the edges of each, then images of them under three prompts. One process a stage, one load of each
# model. Goes on where it was interrupted: the same command again.
#
#     examples/batch.sh PHOTOS OUT        (STEPS=20)
set -eu
photos=$1 out=$2

controlnet detect canny "$photos" -o "$out/maps/" --skip-existing --quiet

mkdir -p "$out"
seed=1
echo cond,prompt,seed > "$out/jobs.csv"
for prompt in "a poster of cells in red, yellow and black" "a poster of circles in blue and white" "a poster in green"; do
    for map in "$out"/maps/*.canny.png; do
        printf '"%s","%s",%d\n' "$map" "$prompt" "$seed" >> "$out/jobs.csv"
    done
    seed=$((seed + 1))
done
controlnet generate --jobs "$out/jobs.csv" --steps "${STEPS:-20}" -o "$out/images/" --skip-existing
