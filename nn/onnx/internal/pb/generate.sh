#!/bin/sh
# Regenerates onnx.pb.go from onnx.proto, the message definitions of the ONNX project (Apache-2.0; taken from the
# Python package onnx 1.23.2). Needs protoc, or a Python with grpcio-tools named by PYTHON, and the Go plugin, which
# is installed into a temporary directory.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.11
if command -v protoc >/dev/null; then
	protoc=protoc
else
	protoc="${PYTHON:-python3} -m grpc_tools.protoc"
fi
PATH="$bin:$PATH" $protoc -I. --go_out=. --go_opt=paths=source_relative \
	--go_opt=Monnx.proto=github.com/lathe-ml/lathe/nn/onnx/internal/pb onnx.proto
