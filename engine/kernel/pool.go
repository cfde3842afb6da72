package kernel

import (
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

	job  Job
	n    int64
	next atomic.Int64
	jobs atomic.Int64 // counts the jobs that helpers may enter
	// entered counts the helpers inside the current job; closed is added when no more may enter.
	entered atomic.Int64
	waiting atomic.Bool // the caller sleeps until idle
	idle    chan struct{}
	fault   atomic.Pointer[any]
	stop    sync.Once
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
func (p *Pool) Run(n int, job Job) {
	if n <= 1 || p.threads == 1 || !p.mu.TryLock() {
		for i := range n {
			job.Do(0, i)
		}
		return
	}
	defer p.mu.Unlock()
	p.job, p.n = job, int64(n)
	p.next.Store(0)
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
			p.next.Store(p.n)
		}
	}()
	for {
		i := p.next.Add(1) - 1
		if i >= p.n {
			return
		}
		p.job.Do(w, int(i))
	}
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
