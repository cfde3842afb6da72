package kernel

import (
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
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
type Pool struct {
	threads int
	mu      sync.Mutex // held while a job runs; who finds it held works alone
	wake    []chan struct{}

	job  Job
	n    int64
	next atomic.Int64
	// entered counts the helpers inside the current job; closed is added when no more may enter.
	entered atomic.Int64
	idle    chan struct{}
	fault   atomic.Pointer[any]
	stop    sync.Once
}

const closed = 1 << 32

// NewPool starts threads-1 helpers, which sleep until Run needs them and end with Close.
func NewPool(threads int) *Pool {
	p := &Pool{threads: max(1, threads), idle: make(chan struct{}, 1)}
	p.entered.Store(closed)
	for w := 1; w < p.threads; w++ {
		c := make(chan struct{}, 1)
		p.wake = append(p.wake, c)
		go p.help(w, c)
	}
	return p
}

// Threads returns the number of workers.
func (p *Pool) Threads() int { return p.threads }

// Close ends the helpers. Run must not be called afterwards.
func (p *Pool) Close() {
	p.stop.Do(func() {
		p.mu.Lock()
		for _, c := range p.wake {
			close(c)
		}
		p.wake = nil
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
	for _, c := range p.wake[:min(len(p.wake), n-1)] {
		select {
		case c <- struct{}{}:
		default: // it has not yet seen an earlier call
		}
	}
	p.work(0)
	if p.entered.Add(closed) != closed {
		<-p.idle
	}
	p.job = nil
	if f := p.fault.Swap(nil); f != nil {
		panic(*f)
	}
}

func (p *Pool) help(w int, c chan struct{}) {
	for range c {
		if !p.enter() {
			continue
		}
		p.work(w)
		if p.entered.Add(-1) == closed {
			p.idle <- struct{}{}
		}
	}
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
