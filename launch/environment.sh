# Sourced by the other scripts: a virtual environment in .venv with everything the project needs.
# The environment is made anew only when pyproject.toml or constraints.txt change.
# Usage: prepare_environment EXTRAS    (for example: quickstart, or test)

prepare_environment() {
  local extras=$1 python=${PYTHON:-python3} stamp
  stamp="$extras $(cat pyproject.toml constraints.txt | cksum)"
  if [ "$(cat .venv/.prepared 2>/dev/null)" != "$stamp" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and pinned: without it the other packages would pull whatever build is newest.
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch setuptools wheel ninja
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    case "$extras" in *test*)
      # Its pinned requirements (another torch) are not wanted; einops-exts comes with the extra.
      .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt open-flamingo ;;
    esac
    echo "$stamp" > .venv/.prepared
  fi
  export PATH="$PWD/.venv/bin:$PATH"
  # DeepSpeed compiles its operators here at first use.
  export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
  if ! nvidia-smi -L >/dev/null 2>&1; then
    # Without a GPU: DeepSpeed's CPU accelerator and gloo, one thread a rank so that ranks do not fight for cores.
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  fi
}
