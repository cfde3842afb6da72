package native_test

import (
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/gomlx/compute/gobackend"

	"github.com/lathe-ml/lathe/engine/native"
)

// byteSource makes one choice of each byte, and goes on with a generator that they seed.
type byteSource struct {
	data []byte
	rest *rand.PCG
}

func (s *byteSource) Uint64() uint64 {
	if len(s.data) == 0 {
		return s.rest.Uint64()
	}
	b := uint64(s.data[0])
	s.data = s.data[1:]
	return b * 0x0101010101010101
}

// decoded makes a graph of bytes.
func decoded(data []byte) func() (r, values *rand.Rand) {
	sum := uint64(len(data))
	for _, b := range data {
		sum = sum*0x100000001b3 ^ uint64(b)
	}
	return func() (r, values *rand.Rand) {
		return rand.New(&byteSource{data, rand.NewPCG(sum, 1)}), rand.New(rand.NewPCG(sum, 2))
	}
}

// FuzzPlanner looks for graphs that the planner gets wrong: bytes choose operations, operands and shapes, axes without
// elements, views, loops and branches included. All memory is watched.
func FuzzPlanner(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 20 {
		data := make([]byte, 16+r.IntN(200))
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		f.Add(data)
	}
	b := native.OpenWatched(f, "threads=2")
	f.Fuzz(func(t *testing.T, data []byte) {
		host, err := gobackend.New("ops_sequential")
		if err != nil {
			t.Fatal(err)
		}
		want, log, err := runGraphOf(host, decoded(data), false)
		if err != nil {
			t.Skip(err)
		}
		got, _, err := runGraphOf(b, decoded(data), false)
		if inferred(err) {
			t.Skip(err)
		}
		if err == nil {
			err = differ(got, want, false)
		}
		if err != nil {
			t.Errorf("%v\n%s", err, strings.Join(log, "\n"))
		}
	})
}
