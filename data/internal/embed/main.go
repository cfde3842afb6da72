// Command embed writes the slice of Fashion-MNIST that package data embeds: the first 2,000 test and the first 64
// training pictures with their labels, as gzip-compressed IDX files. Run it by `go generate ./data`.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
)

func main() {
	dir := flag.String("o", "embedded", "folder to write to")
	flag.Parse()
	if err := run(*dir); err != nil {
		fmt.Fprintln(os.Stderr, "embed:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	for _, part := range []struct {
		name  string
		train bool
		n     int
	}{{"t10k", false, 2000}, {"train", true, 64}} {
		m, err := data.FashionMNIST(context.Background(), part.train)
		if err != nil {
			return err
		}
		m = m.First(part.n)
		labels := make([]byte, m.N)
		for i, l := range m.Labels {
			labels[i] = byte(l)
		}
		for _, f := range []struct {
			kind   string
			shape  []int
			values []byte
		}{{"images", []int{m.N, m.H, m.W}, m.Pixels}, {"labels", []int{m.N}, labels}} {
			path := filepath.Join(dir, fmt.Sprintf("%s-%s.idx.gz", part.name, f.kind))
			b, err := compressIDX(f.shape, f.values)
			if err != nil {
				return err
			}
			if err := atomicfile.WriteFile(path, b); err != nil {
				return err
			}
			fmt.Println(path, len(b))
		}
	}
	return nil
}

func compressIDX(shape []int, values []byte) ([]byte, error) {
	head := []byte{0, 0, 8, byte(len(shape))}
	for _, d := range shape {
		head = binary.BigEndian.AppendUint32(head, uint32(d))
	}
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(append(head, values...)); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
