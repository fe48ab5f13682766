#!/usr/bin/env bash
# Builds docker/Dockerfile, unchanged, on a machine that cannot pull images: on a stand-in for NGC's tritonserver image, which is Debian
# with the server of the nvidia-pytriton wheel in /opt/tritonserver, under NGC's name. Needs root, buildah and mmdebstrap.
# The result is a root file system in build/image/root, which tests/deploy/test_image.py runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
folder=build/image
image=localhost/nemo-triton:check
version=$(sed -n 's/^ARG TRITON_VERSION=//p' docker/Dockerfile)
base=nvcr.io/nvidia/tritonserver:$version-py3
mkdir -p "$folder"
storage=(--root "$PWD/$folder/storage" --runroot "$PWD/$folder/run")
buildah() { command buildah "${storage[@]}" "$@"; }

for tool in buildah mmdebstrap; do
    command -v "$tool" > /dev/null || { echo "image-check: $tool is missing: apt-get install buildah mmdebstrap" >&2; exit 1; }
done

if [[ ! -f $folder/base.tar ]]; then
    echo 'image-check: a Debian root file system'
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,libpython3.11,ca-certificates \
        bookworm "$folder/base.tar.part"
    mv "$folder/base.tar.part" "$folder/base.tar"
fi

echo 'image-check: wheels'
# Of what the locks name, by the same Python as in the stand-in; whatever was fetched before stays.
.venv/bin/python -m pip download -qq --dest "$folder/wheels" "$(sed -n 's/^ARG TORCH=//p' docker/Dockerfile)"
.venv/bin/python -m pip download -qq --dest "$folder/wheels" --require-hashes --requirement requirements/server.txt

echo "image-check: the stand-in for $base"
if ! buildah images --quiet "$base" > /dev/null 2>&1; then
    site=$(.venv/bin/python -c 'import pytriton, pathlib; print(pathlib.Path(pytriton.__file__).parents[1])')
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$folder/base.tar" /
    root=$(buildah mount "$container")
    mkdir -p "$root/opt/tritonserver/lib"
    cp -r "$site"/pytriton/tritonserver/{bin,backends} "$root/opt/tritonserver/"
    cp "$site"/pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub "$root/opt/tritonserver/backends/python/"
    cp "$site"/nvidia_pytriton.libs/* "$root/opt/tritonserver/lib/"
    # The wheel's server finds its libraries beside its wheel; NGC's is told where they are, and so is this one.
    buildah config --env LD_LIBRARY_PATH=/opt/tritonserver/lib "$container"
    buildah umount "$container" > /dev/null
    buildah commit --quiet --rm "$container" "$base" > /dev/null
fi

echo 'image-check: docker/Dockerfile'
buildah bud --pull-never --file docker/Dockerfile --tag "$image" --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels \
    --build-arg "REVISION=$(git rev-parse HEAD)" --volume "$PWD/$folder/wheels:/wheels:ro" . > "$folder/build.log" 2>&1 \
    || { tail -n 40 "$folder/build.log" >&2; exit 1; }
buildah inspect --type image "$image" > "$folder/image.json"

echo 'image-check: its root file system'
container=$(buildah from --pull-never "$image")
root=$(buildah mount "$container")
rm -rf "$folder/root"
cp --archive --reflink=auto "$root" "$folder/root"
buildah umount "$container" > /dev/null
buildah rm "$container" > /dev/null
echo "image-check: $folder/root, $(du -sh "$folder/root" | cut -f1)"
