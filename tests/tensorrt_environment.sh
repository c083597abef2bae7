#!/bin/sh
# Make an environment in which torch_tensorrt converts and builds for TensorRT-RTX, with a GPU or without.
# Usage: tensorrt_environment.sh PYTHON FOLDER. Writes FOLDER/.installed, or says why not and succeeds.
set -u
PYTHON=$1 FOLDER=$2
[ -f "$FOLDER/.installed" ] && exit 0

skip() {
    echo "make tensorrt: skipped, $1"
    exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "the TensorRT-RTX packages are for Linux on x86-64, this is $(uname -sm)"
"$PYTHON" -m venv "$FOLDER" || skip "no environment could be made"
PIP="$FOLDER/bin/python -m pip install --quiet --constraint constraints.txt"
$PIP torch || skip "torch did not install"
$PIP --editable . diffusers transformers accelerate safetensors pytest setuptools wheel dllist psutil packaging filelock ||
    skip "what the tests need did not install"
# ONNX Runtime's plug-in holds the libraries of TensorRT-RTX 1.5
$PIP --no-deps torch-tensorrt-rtx==2.13.0 tensorrt-rtx-cu13-bindings==1.5.0.114 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.3.0 ||
    skip "the TensorRT-RTX packages did not install"
$PIP --no-deps --no-build-isolation tensorrt-rtx-cu13==1.5.0.114 || skip "tensorrt-rtx-cu13 did not install"
PACKAGES=$("$FOLDER/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for library in libtensorrt_rtx libtensorrt_onnxparser_rtx; do
    ln -sf "../onnxruntime_ep_nv_tensorrt_rtx/$library.so.1.5.0" "$PACKAGES/tensorrt_rtx_bindings/$library.so.1"
done
# the C++ runtime needs the CUDA libraries of torch; without these files torch_tensorrt does without
if [ "$("$FOLDER/bin/python" -c 'import torch; print(torch.version.cuda)')" = None ]; then
    mv "$PACKAGES/torch_tensorrt/lib" "$PACKAGES/torch_tensorrt/lib.unused"
fi
"$FOLDER/bin/python" -P -c 'import ctypes, importlib.util as u, os
ctypes.CDLL(os.path.join(os.path.dirname(u.find_spec("tensorrt_rtx_bindings").origin), "libtensorrt_rtx.so.1"))' ||
    skip "the TensorRT-RTX libraries cannot be loaded here"
touch "$FOLDER/.installed"
