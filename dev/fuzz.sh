#!/bin/sh
# Runs every fuzz target for some seconds on its corpus, one after the other:
#
#   dev/fuzz.sh 180                 all of them
#   dev/fuzz.sh 60 tokens recipe    these
#
# Needs cargo-fuzz and a C++ compiler. A finding lies in fuzz/artifacts: mend it and put it into the
# corpus, which tests/corpus.rs replays. What a run adds to the corpus goes to fuzz/target/corpus;
# dev/fuzz.sh does not change what is committed.
set -eu
[ $# -ge 1 ] || { echo "usage: $0 SECONDS [TARGET...]" >&2; exit 2; }
cd "$(dirname "$0")/.."
seconds=$1
shift
[ $# -gt 0 ] || set -- tokens megatron safetensors config index trainer_state recipe mxtrain

# The instrumentation is a feature of unstable compilers, which the stable one has behind this.
export RUSTC_BOOTSTRAP=1
for target in "$@"; do
  echo "== $target"
  mkdir -p "fuzz/target/corpus/$target"
  cargo fuzz run "$target" "fuzz/target/corpus/$target" "fuzz/corpus/$target" -- \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
    -close_fd_mask=1
done
