package main

import (
	"sync"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progressBar shows how far some work is, on a terminal; elsewhere it does nothing. Its methods may be called on nil.
type progressBar struct {
	mu       sync.Mutex
	label    string
	progress *mpb.Progress
	bar      *mpb.Bar
}

// progress starts a progress bar. Close it before anything else is printed.
//
//	bar := a.progress("quantising")
//	defer bar.Close()
//	bar.Set(done, total)
func (a *app) progress(label string) *progressBar {
	if !a.interactive() {
		return nil
	}
	p := &progressBar{label: label}
	p.progress = mpb.New(mpb.WithOutput(a.stderr), mpb.WithWidth(40), mpb.WithAutoRefresh())
	return p
}

// Label replaces the text before the bar.
func (p *progressBar) Label(label string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.label = label
}

// Set says that done of total steps are behind.
func (p *progressBar) Set(done, total int) {
	if p == nil || total <= 0 {
		return
	}
	p.mu.Lock()
	if p.bar == nil {
		p.bar = p.progress.AddBar(int64(total), mpb.BarRemoveOnComplete(),
			mpb.PrependDecorators(decor.Any(func(decor.Statistics) string {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.label
			}, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersNoUnit("%d/%d"), decor.OnComplete(decor.AverageETA(decor.ET_STYLE_GO, decor.WC{W: 8}), "")))
	}
	bar := p.bar
	p.mu.Unlock()
	bar.SetTotal(int64(total), false)
	bar.SetCurrent(int64(done))
}

// Println prints a line above the bar.
func (p *progressBar) Println(line string) {
	if p == nil {
		return
	}
	_, _ = p.progress.Write([]byte(line + "\n"))
}

// Close removes the bar.
func (p *progressBar) Close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	bar := p.bar
	p.mu.Unlock()
	if bar != nil {
		bar.Abort(true)
	}
	p.progress.Wait()
}
