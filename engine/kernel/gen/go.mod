module github.com/lathe-ml/lathe/engine/kernel/gen

go 1.27

require github.com/mmcloughlin/avo v0.5.0 // indirect
