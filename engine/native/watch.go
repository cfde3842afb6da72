package native

import (
	"fmt"
	"math"
	"slices"
	"sync"
)

// Guards, in tests: words before and behind every value in the arena, every constant and every buffer, which nothing may
// write; and memory that is not yet written, or dead, is filled with NaN, so that who reads it shows.

const (
	guardWords = 16
	guardBits  = 0x7fb1c0de // a NaN
	poisonBits = 0x7fbadead // another
)

type watchedConstant struct {
	v   *value
	all []float32 // with guards
	sum uint64
}

// watch looks after the memory of an executable.
type watch struct {
	x          *executable
	born, dies [][]*value // of the arena, by group
	constants  []watchedConstant
	live       []*value
}

func newWatch(x *executable) *watch {
	w := &watch{x: x, born: make([][]*value, len(x.p.groups)), dies: make([][]*value, len(x.p.groups))}
	for _, v := range x.p.order {
		switch {
		case x.inArena(v):
			w.born[v.group] = append(w.born[v.group], v)
			if v.last < len(x.p.groups) {
				w.dies[v.last] = append(w.dies[v.last], v)
			}
		case len(v.buf) > 0 && (v.kind == kindConst || v.constant):
			all := guarded(len(v.buf))
			copy(inside(all), v.buf)
			v.buf = inside(all)
			w.constants = append(w.constants, watchedConstant{v, all, checksum(v.buf)})
		}
	}
	return w
}

func (w *watch) begin() { w.live = w.live[:0] }

// words returns a value's words with guards before and behind them.
func (w *watch) words(v *value) []float32 {
	return w.x.arena[v.place-guardWords:][:v.words()+2*guardWords]
}

// inherits says whether a value has the memory of one that is alive until it is written.
func (w *watch) inherits(v *value) bool {
	return slices.ContainsFunc(w.live, func(b *value) bool { return b.place == v.place })
}

// before prepares for a group.
func (w *watch) before(g int) {
	for _, v := range w.born[g] {
		if !w.inherits(v) {
			setGuards(w.words(v))
			if !v.isForeign() {
				poison(v.buf)
			}
		}
	}
	w.live = append(w.live, w.born[g]...)
}

// after looks at all memory after a group.
func (w *watch) after(g int) error {
	for _, v := range w.live {
		if !intact(w.words(v)) {
			return fmt.Errorf("group %d wrote outside a value of %v at %d", g, v.dims, v.place)
		}
	}
	for _, c := range w.constants {
		if !intact(c.all) || checksum(c.v.buf) != c.sum {
			return fmt.Errorf("group %d wrote to a constant of %v", g, c.v.dims)
		}
	}
	if !w.x.b.mem.watched.intact() {
		return fmt.Errorf("group %d wrote outside a buffer", g)
	}
	dead := w.dies[g]
	w.live = slices.DeleteFunc(w.live, func(v *value) bool { return slices.Contains(dead, v) })
	for _, v := range dead {
		if !w.inherits(v) && !v.isForeign() {
			poison(v.buf)
		}
	}
	return nil
}

func setGuards(words []float32) {
	g := math.Float32frombits(guardBits)
	fill(words[:guardWords], g)
	fill(words[len(words)-guardWords:], g)
}

func poison(words []float32) { fill(words, math.Float32frombits(poisonBits)) }

func intact(words []float32) bool {
	for _, part := range [][]float32{words[:guardWords], words[len(words)-guardWords:]} {
		for _, v := range part {
			if math.Float32bits(v) != guardBits {
				return false
			}
		}
	}
	return true
}

func checksum(words []float32) (s uint64) {
	for _, v := range words {
		s = s*0x9e3779b97f4a7c15 + uint64(math.Float32bits(v))
	}
	return s
}

// guarded returns n words with guards before and behind them.
func guarded(n int) []float32 {
	f := aligned(n + 2*guardWords)
	setGuards(f)
	return f
}

// inside returns the words between guards.
func inside(f []float32) []float32 {
	n := len(f) - guardWords
	return f[guardWords:n:n]
}

// watchedMemory knows all buffers that are in use.
type watchedMemory struct {
	mu   sync.Mutex
	used map[*float32][]float32 // with guards, by the first word inside
}

func (m *watchedMemory) get(n int) []float32 {
	all := guarded(n)
	f := inside(all)
	poison(f)
	if n > 0 {
		m.mu.Lock()
		m.used[&f[0]] = all
		m.mu.Unlock()
	}
	return f
}

func (m *watchedMemory) put(f []float32) {
	if len(f) > 0 {
		m.mu.Lock()
		delete(m.used, &f[0])
		m.mu.Unlock()
		poison(f)
	}
}

func (m *watchedMemory) intact() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, f := range m.used {
		if !intact(f) {
			return false
		}
	}
	return true
}
