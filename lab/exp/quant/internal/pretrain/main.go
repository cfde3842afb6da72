// Command pretrain trains ViT-A by its recipe on Fashion-MNIST, spreads its channel ranges as the experiment does, and
// writes the weights that the demonstration embeds:
//
//	go run ./lab/exp/quant/internal/pretrain -o lab/exp/quant/weights/vit-a-spread.safetensors
package main

import (
	"context"
	"flag"
	"fmt"
	"log"

	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/lab"
	exp "github.com/lathe-ml/lathe/lab/exp/quant"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

func main() {
	out := flag.String("o", "vit-a-spread.safetensors", "file to write")
	backend := flag.String("backend", "go", "what computes")
	flag.Parse()
	if err := run(context.Background(), *out, *backend); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, out, backend string) error {
	b, err := engine.Open(backend)
	if err != nil {
		return err
	}
	r := exp.ViTA(lab.Full)
	net, err := r.Build()
	if err != nil {
		return err
	}
	err = r.Train(ctx, b, net, out+".ckpt", func(done, total int, i learn.Info) {
		if done%100 == 0 {
			fmt.Printf("step %d of %d: loss %.3f\n", done, total, i.Loss)
		}
	})
	if err != nil {
		return err
	}
	if _, err := quant.SpreadChannels(net, exp.SpreadFactor, 0); err != nil {
		return err
	}
	f := &safetensors.File{Meta: map[string]string{"architecture": "ViT-A", "data": "Fashion-MNIST, 60,000 training images", "note": "channel ranges of the norms spread by up to 36 times; the same function as the trained network"}}
	for p := range net.Params.All() {
		f.Tensors = append(f.Tensors, safetensors.FromFloats(p.Name, p.Data(), p.Value.Shape().Dimensions...))
	}
	return safetensors.WriteFile(out, f)
}
