#!/bin/bash
# drop.sh KEY INBOX FIRST LAST: a job for each seed by the README's recipe. Prints a line per job: its seed, when mv
# returned (seconds since 1970), and the signed bytes; of those that failed nothing.
set -u
key=$1 inbox=$2 host=$(hostname)
for seed in $(seq "$3" "$4"); do
    now=$(date -u +%FT%TZ)
    body=$(printf '{"schema":"imagend.job/v1","kind":"generate","issued_at":"%s","prompt":"x","seed":%s}' "$now" "$seed")
    sig=$(printf %s "$body" | ssh-keygen -q -Y sign -n imagend-job@v1 -f "$key" | sed '1d;$d' | tr -d '\n')
    name=$host-$seed.json
    printf '%s,"signature":"%s"}' "${body%\}}" "$sig" > "$inbox/.$name" && sync "$inbox/.$name" &&
        mv "$inbox/.$name" "$inbox/$name" && echo "$seed $(date +%s.%N) $body"
done
