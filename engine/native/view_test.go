package native

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// elements lists the places of a view's elements in order.
func elements(v view) []int {
	out := []int{v.off}
	for a, d := range v.dims {
		var n []int
		for _, o := range out {
			for i := range d {
				n = append(n, o+i*v.str[a])
			}
		}
		out = n
	}
	return out
}

func TestReshapeKeepsTheOrderOfElements(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	moved, kept := 0, 0
	for range 20000 {
		// a random view of memory, by transposing, broadcasting, slicing and reversing
		v := view{dims: []int{}, str: []int{}}
		for range r.IntN(5) {
			v.dims = append(v.dims, []int{1, 2, 3, 4, 6}[r.IntN(5)])
		}
		v.str = rowMajor(v.dims)
		if len(v.dims) > 0 {
			if r.IntN(2) == 0 {
				v = v.transpose(r.Perm(len(v.dims)))
			}
			a := r.IntN(len(v.dims))
			switch r.IntN(4) {
			case 0:
				v = v.reverse([]int{a})
			case 1:
				v.str[a] = 0
			case 2:
				v.str[a] *= 2
			}
		}
		// the same size cut another way
		left, dims := v.size(), []int{}
		for left > 1 {
			d := 1 + r.IntN(left)
			if left%d == 0 {
				dims, left = append(dims, d), left/d
			}
		}
		w, ok := v.reshape(dims)
		if !ok {
			moved++
			continue
		}
		kept++
		if !slices.Equal(elements(v), elements(w)) {
			t.Fatalf("%v %v reshaped to %v %v", v.dims, v.str, w.dims, w.str)
		}
	}
	if moved == 0 || kept == 0 {
		t.Fatalf("%d views moved, %d kept: the test does not see both", moved, kept)
	}
}

func TestRefineAndSplitKeepTheOrderOfElements(t *testing.T) {
	for _, c := range []struct {
		a, b, want []int
		ok         bool
	}{
		{[]int{6, 4}, []int{24}, []int{6, 4}, true},
		{[]int{6, 4}, []int{3, 8}, []int{3, 2, 4}, true},
		{[]int{1, 6, 1}, []int{6}, []int{6}, true},
		{[]int{6, 4}, []int{4, 6}, nil, false},
		{[]int{6}, []int{7}, nil, false},
		{[]int{}, []int{1}, nil, true},
	} {
		got, ok := refine(c.a, c.b)
		if ok != c.ok || !slices.Equal(got, c.want) {
			t.Errorf("refine(%v, %v) = %v %v, want %v %v", c.a, c.b, got, ok, c.want, c.ok)
		}
	}
	if got := split([]int{6, 1, 4}, []int{10, 99, 1}, []int{3, 2, 4}); !slices.Equal(got, []int{20, 10, 1}) {
		t.Errorf("split gives %v", got)
	}
}
