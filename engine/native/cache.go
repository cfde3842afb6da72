package native

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"github.com/gomlx/compute"
)

// maxPlans is how many plans a backend keeps, those that no computation uses any more included.
const maxPlans = 64

// planCache holds plans by what they compute, the most recently used last.
type planCache struct {
	mu    sync.Mutex
	plans []*compiled
}

// compiled is a plan that all computations of equal graphs share. A call takes one of its executables out and puts it
// back; where none is idle, as when two computations run at once, another is planned. Their number is at most that of
// the computations alive, and without computations they hold no arena.
type compiled struct {
	key [sha256.Size]byte
	fn  *Function

	mu    sync.Mutex
	idle  []*executable
	users int
	made  Report
}

// find returns the plan of a key, if there is one, as used by one computation more.
func (c *planCache) find(key [sha256.Size]byte) *compiled {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.plans, func(p *compiled) bool { return p.key == key })
	if i < 0 {
		return nil
	}
	p := c.plans[i]
	c.plans = append(slices.Delete(c.plans, i, i+1), p)
	p.mu.Lock()
	p.users++
	p.mu.Unlock()
	return p
}

// add keeps a plan and drops the one that was not used for longest if there are too many. Computations that use that one
// go on.
func (c *planCache) add(p *compiled) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.plans) >= maxPlans {
		c.plans = slices.Delete(c.plans, 0, 1)
	}
	c.plans = append(c.plans, p)
}

func (c *planCache) drop() {
	c.mu.Lock()
	c.plans = nil
	c.mu.Unlock()
}

// take returns an executable that nobody else runs.
func (c *compiled) take(b *Backend) (*executable, error) {
	c.mu.Lock()
	if k := len(c.idle) - 1; k >= 0 {
		x := c.idle[k]
		c.idle = c.idle[:k]
		c.mu.Unlock()
		return x, nil
	}
	c.mu.Unlock()
	return planFunction(b, c.fn)
}

func (c *compiled) put(x *executable) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = append(c.idle, x)
	c.trim()
}

// leave says that a computation is gone.
func (c *compiled) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.users--
	c.trim()
}

func (c *compiled) trim() {
	if n := max(1, c.users); len(c.idle) > n {
		c.idle = slices.Delete(c.idle, n, len(c.idle))
	}
	if c.users == 0 {
		for _, x := range c.idle {
			x.dropMemory()
		}
	}
}

// compile returns the plan of a finished function, an old one of an equal function if there is one, or nil where the
// kernels have nothing to do.
func (b *Backend) compile(f *Function) (c *compiled, r Report, err error) {
	begin := time.Now()
	key := f.key()
	if c = b.plans.find(key); c != nil {
		r = c.made
		r.Cached, r.Compile = true, time.Since(begin)
		return c, r, nil
	}
	x, err := planFunction(b, f)
	if x == nil || err != nil {
		return nil, r, err
	}
	c = &compiled{key: key, fn: f, idle: []*executable{x}, users: 1, made: x.report()}
	c.made.Compile = time.Since(begin)
	b.plans.add(c)
	return c, c.made, nil
}

// key digests what a function computes: operations, shapes, attributes and constants, but not names.
func (f *Function) key() (k [sha256.Size]byte) {
	w := keyWriter{functions: map[*Function]int{}}
	w.function(f)
	return sha256.Sum256(w.text)
}

var constantSeeds = [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}

type keyWriter struct {
	text      []byte
	functions map[*Function]int
}

// ints writes numbers, and how many they are.
func (w *keyWriter) ints(n ...int) {
	w.text = binary.AppendVarint(w.text, int64(len(n)))
	for _, v := range n {
		w.text = binary.AppendVarint(w.text, int64(v))
	}
}

func (w *keyWriter) nodes(nodes []*node) {
	w.ints(len(nodes))
	for _, n := range nodes {
		w.ints(w.functions[n.fn], n.id)
	}
}

func (w *keyWriter) function(f *Function) {
	w.functions[f] = len(w.functions)
	w.ints(w.functions[f], len(f.params), len(f.calls))
	for _, c := range f.calls {
		w.ints(int(c.op), len(c.out))
		w.nodes(c.in)
		for _, n := range c.out {
			w.ints(int(n.shape.DType))
			w.ints(n.shape.Dimensions...)
		}
		switch a := c.attr.(type) {
		case nil:
		case []int:
			w.ints(a...)
		case int:
			w.ints(a)
		case closures:
			w.ints(a.axis, len(a.fns))
			w.text = strconv.AppendBool(w.text, a.stable)
			for _, g := range a.fns {
				w.function(g)
			}
		default:
			if c.op == compute.OpTypeConstant {
				b := bytesOf(a) // may be long, so by a faster hash
				w.text = binary.LittleEndian.AppendUint64(w.text, maphash.Bytes(constantSeeds[0], b))
				w.text = binary.LittleEndian.AppendUint64(w.text, maphash.Bytes(constantSeeds[1], b))
			} else {
				w.text = fmt.Appendf(w.text, "%T%v\n", a, a)
			}
		}
	}
	w.nodes(f.out)
}

// bytesOf returns the memory of a slice of numbers.
func bytesOf(flat any) []byte {
	v := reflect.ValueOf(flat)
	if v.Len() == 0 {
		return nil
	}
	return unsafe.Slice((*byte)(v.UnsafePointer()), v.Len()*int(v.Type().Elem().Size()))
}
