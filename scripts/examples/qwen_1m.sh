#!/usr/bin/env bash
# Serves a Qwen checkpoint up to a million tokens with Dual Chunk Attention on NVIDIA GPUs.
#
# THE CUDA PATH OF DCA HAS NOT RUN ON A GPU YET. Its kernels agree with the reference in Triton's
# interpreter and compile for compute capability 8.0, 9.0 and 10.0; nothing is measured. This
# script's own test checks the command that it makes, on a machine without a GPU.
set -euo pipefail

usage() {
    cat <<'END'
Usage: qwen_1m.sh [--dry-run] MODEL GPUS [arguments of `vllm serve`, which win over those here]

MODEL is a name on the Hub or a directory:
  Qwen/Qwen2.5-7B-Instruct-1M, Qwen/Qwen2.5-14B-Instruct-1M
      start as they are: config.json has the chunk sizes (dual_chunk_attention_config).
  Qwen/Qwen3-30B-A3B-Instruct-2507, -Thinking-2507 and their 235B
      stop at 262,144 tokens. Their chunk sizes are in config_1m.json: put it in the place of
      config.json, in a directory of yours:
          hf download Qwen/Qwen3-30B-A3B-Instruct-2507 --local-dir qwen3
          cp qwen3/config_1m.json qwen3/config.json
GPUS is how many GPUs share the model (tensor parallel): 1, 2 or 4 for the 7B, 1, 2, 4 or 8 for
the others. A million tokens fit in bf16, by weights and keys, from: the 7B on 1 GPU of 80 GB, the
14B and the 30B on 4, the 235B on 8 of 141 GB. More GPUs than KV heads (8 in the 14B, 4 in the
others) add speed, not room for keys. The 7B on eight GPUs: GPUS 1 and --data-parallel-size 8.
--dry-run prints the command and starts nothing.

Both families ask for sparse prefill, which is off until you ask for it: attention is dense, and a
warning says so. On, it selects by the budgets that the checkpoint brings:
  --additional-config '{"dca": {"sparse": "checkpoint"}}'

Before a start, `vllm-dca explain MODEL --max-model-len 1010000
--tensor-parallel-size GPUS` says how much memory a request takes on each GPU. If that is too much:
  --max-model-len 524288           shorter requests
  --kv-cache-dtype fp8             half the memory, from compute capability 8.9; slower prefill
  --max-num-batched-tokens 16384   less for a step's activations, and other requests wait less
END
}

refuse() {
    echo "$1" >&2
    exit 1
}

dry_run=
case ${1-} in
-h | --help) usage && exit ;;
--dry-run) dry_run=yes && shift ;;
esac
if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    usage >&2
    exit 2
fi
model=$1 gpus=$2
shift 2

# Without the authors' chunk sizes DCA would derive its own from the window, and start.
if [[ $* != *chunk_size* ]]; then
    if [[ -d $model ]]; then
        grep -q dual_chunk_attention_config "$model/config.json" ||
            refuse "$model/config.json has no chunk sizes. Put config_1m.json in its place."
    elif [[ $model == *-2507* ]]; then
        refuse "$model needs its config_1m.json: download it first, see $0 --help."
    fi
fi

# A single GPU has all weights, and less room for what a step keeps.
step=$((gpus == 1 ? 8192 : 32768))
command=(
    vllm serve "$model"
    --attention-backend dca
    --max-model-len 1010000
    --tensor-parallel-size "$gpus"
    # Prefill goes in steps of so many tokens, between which other requests decode. A step reads
    # all keys before it again: small steps cost time, large ones memory.
    --enable-chunked-prefill
    --max-num-batched-tokens "$step"
    # What weights and activations leave of this is KV cache.
    --gpu-memory-utilization 0.92
    "$@"
)
if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
