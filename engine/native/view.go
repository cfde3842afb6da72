package native

import "slices"

// view says where the elements of a value lie in the memory of its base: element i at off + sum of i[k]*str[k].
type view struct {
	base      *value
	off       int
	dims, str []int
}

// rowMajor returns the strides of contiguous memory.
func rowMajor(dims []int) []int {
	s, p := make([]int, len(dims)), 1
	for i := len(dims) - 1; i >= 0; i-- {
		s[i] = p
		p *= dims[i]
	}
	return s
}

func size(dims []int) int {
	p := 1
	for _, d := range dims {
		p *= d
	}
	return p
}

func (v view) size() int { return size(v.dims) }

// contiguous says whether the elements lie in order without gaps.
func (v view) contiguous() bool {
	p := 1
	for i := len(v.dims) - 1; i >= 0; i-- {
		if v.dims[i] != 1 && v.str[i] != p {
			return false
		}
		p *= v.dims[i]
	}
	return true
}

// whole says whether the view is its base, in order.
func (v view) whole() bool { return v.off == 0 && v.contiguous() && v.size() == size(v.base.dims) }

// reshape returns the view with other dimensions, or false where the elements would have to move.
func (v view) reshape(dims []int) (view, bool) {
	r := view{v.base, v.off, dims, make([]int, len(dims))}
	if v.contiguous() {
		r.str = rowMajor(dims)
		return r, true
	}
	// Go through both lists from the end, matching runs of axes of the old shape that lie evenly in memory with runs of
	// axes of the new one of the same size.
	var old, str []int
	for i, d := range v.dims {
		if d != 1 {
			old, str = append(old, d), append(str, v.str[i])
		}
	}
	j := len(dims) - 1
	for i := len(old) - 1; i >= 0; {
		first, n := i, old[i]
		for first > 0 && str[first-1] == old[first]*str[first] {
			first--
			n *= old[first]
		}
		s := str[i]
		for left := n; ; j-- {
			for j >= 0 && dims[j] == 1 {
				j--
			}
			if left == 1 {
				break
			}
			if j < 0 || left%dims[j] != 0 {
				return view{}, false
			}
			r.str[j] = s
			s *= dims[j]
			left /= dims[j]
		}
		i = first - 1
	}
	return r, true
}

func (v view) transpose(permutation []int) view {
	r := view{v.base, v.off, nil, nil}
	for _, a := range permutation {
		r.dims, r.str = append(r.dims, v.dims[a]), append(r.str, v.str[a])
	}
	return r
}

// broadcast puts axis i of v at axes[i] of the new dimensions; where they differ, it is 1 and repeats.
func (v view) broadcast(dims, axes []int) view {
	r := view{v.base, v.off, dims, make([]int, len(dims))}
	for i, a := range axes {
		if v.dims[i] == dims[a] && dims[a] != 1 {
			r.str[a] = v.str[i]
		}
	}
	return r
}

// stretch broadcasts v to dims of the same rank, or of any rank if v has one element.
func (v view) stretch(dims []int) view {
	r := view{v.base, v.off, dims, make([]int, len(dims))}
	if len(v.dims) == len(dims) {
		for i, d := range dims {
			if v.dims[i] == d && d != 1 {
				r.str[i] = v.str[i]
			}
		}
	}
	return r
}

func (v view) slice(dims []int, a sliceAttr) view {
	r := view{v.base, v.off, dims, slices.Clone(v.str)}
	for i := range dims {
		r.off += a.starts[i] * v.str[i]
		if len(a.strides) > 0 {
			r.str[i] *= a.strides[i]
		}
	}
	return r
}

func (v view) reverse(axes []int) view {
	r := view{v.base, v.off, v.dims, slices.Clone(v.str)}
	for _, a := range axes {
		r.off += (v.dims[a] - 1) * v.str[a]
		r.str[a] = -v.str[a]
	}
	return r
}

// offsets lists the places of all elements along some axes, relative to the lowest place that the view reaches.
func (v view) offsets(axes []int) []int32 {
	n := 1
	for _, a := range axes {
		n *= v.dims[a]
	}
	out := make([]int32, n)
	if n == 0 {
		return out
	}
	// from the last axis on: what is there is repeated for each step of the axis before
	done := 1
	for i := len(axes) - 1; i >= 0; i-- {
		a := axes[i]
		low, step := int32(v.back(a)), int32(v.str[a])
		for k := v.dims[a] - 1; k >= 0; k-- { // the first copy last: it is the source
			add := low + int32(k)*step
			d := out[k*done : (k+1)*done]
			for j, o := range out[:done] {
				d[j] = o + add
			}
		}
		done *= v.dims[a]
	}
	return out
}

// back returns how far an axis reaches below the view's offset.
func (v view) back(a int) int {
	if v.str[a] < 0 {
		return -(v.dims[a] - 1) * v.str[a]
	}
	return 0
}

// low returns the lowest place that the view reaches.
func (v view) low() int {
	o := v.off
	for a := range v.dims {
		o -= v.back(a)
	}
	return o
}

// factors returns the dimensions other than 1.
func factors(dims []int) []int {
	return slices.DeleteFunc(slices.Clone(dims), func(d int) bool { return d == 1 })
}

// refine returns the coarsest dimensions that both lists can be split into, of equal size, if there are any.
func refine(a, b []int) ([]int, bool) {
	if slices.Equal(a, b) {
		return factors(a), true
	}
	if size(a) != size(b) {
		return nil, false
	}
	// cuts are the places between axes, as products of the dimensions before them
	var cuts []int
	for _, dims := range [][]int{a, b} {
		p := 1
		for _, d := range dims {
			p *= d
			cuts = append(cuts, p)
		}
	}
	slices.Sort(cuts)
	var out []int
	last := 1
	for _, c := range slices.Compact(cuts) {
		if c%last != 0 {
			return nil, false
		}
		if c > last {
			out = append(out, c/last)
		}
		last = c
	}
	return out, true
}

// split returns the strides of a view over finer dimensions, as refine makes them.
func split(dims, str, fine []int) []int {
	out := make([]int, 0, len(fine))
	j := 0
	for i, d := range dims {
		for rest := d; rest > 1; j++ {
			rest /= fine[j]
			out = append(out, str[i]*rest)
		}
	}
	return out
}
