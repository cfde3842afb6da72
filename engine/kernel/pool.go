package kernel

import (
	"math"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// EnvThreads is the environment variable that sets the number of workers; the default is GOMAXPROCS.
const EnvThreads = "LATHE_THREADS"

// DefaultThreads returns the number of workers that LATHE_THREADS or else GOMAXPROCS asks for, at least 1.
func DefaultThreads() int {
	if n, err := strconv.Atoi(os.Getenv(EnvThreads)); err == nil && n > 0 {
		return n
	}
	return runtime.GOMAXPROCS(0)
}

// Job is work in pieces that may run in any order and at the same time.
type Job interface {
	// Do does piece i. worker is below the pool's Threads, and no two pieces run at once under one number.
	Do(worker, i int)
}

// Pool is a fixed number of workers, of which the caller of Run is one. The zero value is not usable; see NewPool.
// How many workers there are, and which of them does which piece, must not change a result: jobs are cut into pieces
// by their sizes alone.
//
// Jobs often follow each other within microseconds, while it takes the system many to put a thread to sleep and to wake
// it: whoever waits does so awake for a moment (spins) before it sleeps.
type Pool struct {
	threads int
	spins   int
	mu      sync.Mutex // held while a job runs; who finds it held works alone
	helpers []*helper

	job     Job
	queues  queues
	inOrder bool
	jobs    atomic.Int64 // counts the jobs that helpers may enter
	// entered counts the helpers inside the current job; closed is added when no more may enter.
	entered atomic.Int64
	waiting atomic.Bool // the caller sleeps until idle
	idle    chan struct{}
	fault   atomic.Pointer[any]
	stop    sync.Once
}

// queues hold the pieces of a job, a stretch of them for each worker to begin with: consecutive jobs mostly go over the
// same arrays in the same order, so that a worker finds in its cache what it wrote itself. Whoever is done takes from the
// ends of the others' queues.
type queues []queue

type queue struct {
	left atomic.Uint64 // the first piece, and in the upper half the end
	_    [7]uint64     // a cache line for each
}

// set puts n pieces in.
func (q queues) set(n int) {
	for w := range q {
		q[w].set(share(n, w, len(q)))
	}
}

// take removes a piece for a worker.
func (q queues) take(w int) (int, bool) {
	i, ok := q[w].take(true)
	for k := 1; !ok && k < len(q); k++ {
		i, ok = q[(w+k)%len(q)].take(false)
	}
	return i, ok
}

func (q *queue) set(begin, end int) { q.left.Store(uint64(end)<<32 | uint64(begin)) }

// take removes the first piece or the last.
func (q *queue) take(first bool) (int, bool) {
	for {
		l := q.left.Load()
		begin, end := uint32(l), uint32(l>>32)
		if begin >= end {
			return 0, false
		}
		piece, rest := end-1, l-1<<32
		if first {
			piece, rest = begin, l+1
		}
		if q.left.CompareAndSwap(l, rest) {
			return int(piece), true
		}
	}
}

type helper struct {
	asleep atomic.Bool // whoever clears it sends to wake
	wake   chan struct{}
}

const closed = 1 << 32

// maxSpins is how many pauses of a processor, of some 50 ns, a worker waits awake: longer than the stretches of small work
// between the products of a training step, which one worker does alone. (With 300, which is what a wake-up takes, an
// unrolled LSTM gained nothing from a second thread.)
const maxSpins = 2000

// shortSpins is how many of them a worker waits for another inside a job before it lets other goroutines run.
const shortSpins = 300

// NewPool starts threads-1 helpers, which sleep until Run needs them and end with Close.
func NewPool(threads int) *Pool {
	p := &Pool{threads: max(1, threads), idle: make(chan struct{}, 1)}
	p.queues = make(queues, p.threads)
	if runtime.GOMAXPROCS(0) >= p.threads { // or a spinning worker might keep the awaited one from running
		p.spins = maxSpins
	}
	p.entered.Store(closed)
	for w := 1; w < p.threads; w++ {
		h := &helper{wake: make(chan struct{}, 1)}
		p.helpers = append(p.helpers, h)
		go p.help(w, h)
	}
	return p
}

// Threads returns the number of workers.
func (p *Pool) Threads() int { return p.threads }

// Close ends the helpers. Run must not be called afterwards.
func (p *Pool) Close() {
	p.stop.Do(func() {
		p.mu.Lock()
		for _, h := range p.helpers {
			close(h.wake)
		}
		p.helpers = nil
		p.mu.Unlock()
	})
}

// Run does pieces 0 to n-1 of a job and returns when all are done. A panic in a piece comes out of Run. Several
// goroutines may call Run; one at a time is helped.
func (p *Pool) Run(n int, job Job) { p.run(n, job, false) }

// RunInOrder is Run for a job whose pieces may wait for those before them: they are begun in order.
func (p *Pool) RunInOrder(n int, job Job) { p.run(n, job, true) }

func (p *Pool) run(n int, job Job, inOrder bool) {
	if n <= 1 || p.threads == 1 || n > math.MaxInt32 || !p.mu.TryLock() {
		for i := range n {
			job.Do(0, i)
		}
		return
	}
	defer p.mu.Unlock()
	p.job, p.inOrder = job, inOrder
	if inOrder {
		p.queues[0].set(0, n)
	} else {
		p.queues.set(n)
	}
	p.entered.Store(0)
	p.jobs.Add(1)
	for _, h := range p.helpers[:min(len(p.helpers), n-1)] {
		if h.asleep.CompareAndSwap(true, false) {
			h.wake <- struct{}{}
		}
	}
	p.work(0)
	if p.entered.Add(closed) != closed {
		p.awaitHelpers()
	}
	p.job = nil
	if f := p.fault.Swap(nil); f != nil {
		panic(*f)
	}
}

// awaitHelpers returns when no helper is in the job, which none may enter any more.
func (p *Pool) awaitHelpers() {
	for range p.spins {
		if p.entered.Load() == closed {
			return
		}
		spinPause()
	}
	p.waiting.Store(true)
	if p.entered.Load() == closed && p.waiting.CompareAndSwap(true, false) {
		return
	}
	<-p.idle
}

func (p *Pool) help(w int, h *helper) {
	seen := int64(0)
	for p.awaitJob(h, seen) {
		seen = p.jobs.Load()
		if !p.enter() {
			continue
		}
		p.work(w)
		if p.entered.Add(-1) == closed && p.waiting.CompareAndSwap(true, false) {
			p.idle <- struct{}{}
		}
	}
}

// awaitJob waits for a job after those seen; false means that the pool is closed.
func (p *Pool) awaitJob(h *helper, seen int64) bool {
	for range p.spins {
		if p.jobs.Load() != seen {
			return true
		}
		spinPause()
	}
	h.asleep.Store(true)
	if p.jobs.Load() != seen && h.asleep.CompareAndSwap(true, false) {
		return true
	}
	_, open := <-h.wake
	return open
}

// enter joins the current job, unless it is over.
func (p *Pool) enter() bool {
	for {
		e := p.entered.Load()
		if e >= closed {
			return false
		}
		if p.entered.CompareAndSwap(e, e+1) {
			return true
		}
	}
}

func (p *Pool) work(w int) {
	defer func() {
		if r := recover(); r != nil {
			p.fault.CompareAndSwap(nil, &r)
			p.queues.set(0)
		}
	}()
	for {
		i, ok := p.take(w)
		if !ok {
			return
		}
		p.job.Do(w, i)
	}
}

func (p *Pool) take(w int) (int, bool) {
	if p.inOrder {
		return p.queues[0].take(true)
	}
	return p.queues.take(w)
}

// pause passes the time of a short wait, the longer the more often it was called: a few turns of a loop, then other
// goroutines' time, then sleep, so that a wait for a worker that the system has put aside costs little.
func pause(spin int) {
	switch {
	case spin < shortSpins:
		spinPause()
	case spin < 2*shortSpins:
		runtime.Gosched()
	default:
		time.Sleep(50 * time.Microsecond)
	}
}
