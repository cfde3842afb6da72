// Command pages renders text pages in four rotations, with a labels file, for the comparison of document models:
//
//	go run ./test/peers/pages -n 50 -o DIR      200 pictures, DIR/labels.csv
package main

import (
	"context"
	"flag"
	"fmt"
	"image/png"
	"log"
	"os"
	"path/filepath"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/render"
)

func main() {
	n := flag.Int("n", 50, "pages; each gives four pictures")
	out := flag.String("o", "pages", "folder to write to")
	seed := flag.Uint64("seed", 7, "seed of the pages")
	flag.Parse()
	if err := run(*n, *out, *seed); err != nil {
		log.Fatal(err)
	}
}

func run(n int, out string, seed uint64) error {
	text, err := data.Austen(context.Background())
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	labels := "file,label\n"
	for i := range n {
		page, err := render.Page(text, render.PageOptions{Scan: true, Seed: seed<<32 | uint64(i)})
		if err != nil {
			return err
		}
		for q := range 4 {
			name := fmt.Sprintf("page-%03d-%d.png", i, 90*q)
			f, err := os.Create(filepath.Join(out, name))
			if err != nil {
				return err
			}
			if err := png.Encode(f, render.Rotate(page, q)); err != nil {
				return err
			}
			if err := f.Close(); err != nil {
				return err
			}
			labels += fmt.Sprintf("%s,%d\n", name, q)
		}
	}
	return os.WriteFile(filepath.Join(out, "labels.csv"), []byte(labels), 0o644)
}
