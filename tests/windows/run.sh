#!/usr/bin/env bash
# Run the Windows Python of a folder that prepare.sh has made. Usage: run.sh FOLDER ARGUMENT...
# Its streams are pipes, because Wine's Python cannot use files; all of it is ended with it.
set -uo pipefail
folder=$1
shift
# Wine makes names of files in the encoding of the locale.
export LC_ALL=C.UTF-8
export WINEPREFIX=$folder/prefix WINEARCH=win64 WINEDEBUG=-all DISPLAY= PYTHONDONTWRITEBYTECODE=1
for name in $(compgen -e | grep -i -E '^(python|pytest|virtual_env|llama|hf_|tmpdir)'); do
  [ "$name" = PYTHONDONTWRITEBYTECODE ] || unset "$name"
done
mkdir -p "$WINEPREFIX"
server=$(command -v wineserver || echo /usr/lib/wine/wineserver)
trap '"$server" -k 2>/dev/null || true' EXIT
true | wine "$folder/python/python.exe" "$@" 2>&1 | cat
