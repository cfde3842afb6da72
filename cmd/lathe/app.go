package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/gomlx/compute"
	"golang.org/x/term"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/store"
)

// Exit codes.
const (
	exitDone        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130 // stopped by SIGINT or SIGTERM after saving; the same command goes on from there
)

// app is what the verbs share: where they write, and the flags that all of them have.
type app struct {
	args           []string
	stdin          io.Reader
	stdout, stderr io.Writer

	json        bool   // --json
	quiet       bool   // --quiet
	backendName string // --backend

	find func(method string) (lab.Experiment, error) // the experiment of a method, by anything that names it

	running bool // a verb has started: errors from here on are not usage errors
	emitted bool // a JSON value has been printed
}

// run executes the command line and returns the exit code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) (code int) {
	a := &app{args: args, stdin: stdin, stdout: stdout, stderr: stderr, find: findExperiment}
	return a.execute()
}

func (a *app) execute() (code int) {
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(a.stderr, "lathe: internal error: %v\n", r)
			if os.Getenv("LATHE_DEBUG") != "" {
				a.stderr.Write(debug.Stack())
			} else {
				fmt.Fprintln(a.stderr, "Set LATHE_DEBUG=1 and run the command again for the stack trace.")
			}
			code = exitFailed
		}
	}()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once

	root := newRootCommand(a)
	root.SetArgs(a.args)
	return a.exitCode(ctx, root.ExecuteContext(ctx))
}

// exitCode reports err and turns it into the exit code.
func (a *app) exitCode(ctx context.Context, err error) int {
	if err == nil {
		return exitDone
	}
	code := exitFailed
	var usage *usageError
	var stopped *interruptedError
	switch {
	case errors.As(err, &usage) || !a.running:
		code = exitUsage
	case errors.As(err, &stopped):
		code = exitInterrupted
	case ctx.Err() != nil && errors.Is(err, context.Canceled):
		code, err = exitInterrupted, errors.New("interrupted; what was finished is saved, and the same command goes on from there")
	}
	fmt.Fprintf(a.stderr, "lathe: %v\n", err)
	if (a.json || slices.Contains(a.args, "--json")) && !a.emitted { // a wrong flag before --json hides it
		_ = a.printJSON(map[string]any{"error": err.Error(), "exit_code": code})
	}
	return code
}

// usageError is wrong use of the command line: exit code 2.
type usageError struct{ message string }

func (e *usageError) Error() string { return e.message }

// usageErrorf returns an error that ends the command with exit code 2.
func usageErrorf(format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...)}
}

// interruptedError is an end by SIGINT or SIGTERM after which there is nothing to go on from: exit code 130.
type interruptedError struct{ error }

// emit prints the result of a verb: v as JSON with --json, and what human writes otherwise.
func (a *app) emit(v any, human func(w io.Writer) error) error {
	if a.json {
		return a.printJSON(v)
	}
	return human(a.stdout)
}

func (a *app) printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("print JSON: %w", err)
	}
	a.emitted = true
	_, err = a.stdout.Write(append(b, '\n'))
	return err
}

// note prints a remark for a person on the error stream, unless --quiet or --json is given.
func (a *app) note(format string, args ...any) {
	if !a.quiet && !a.json {
		fmt.Fprintf(a.stderr, format+"\n", args...)
	}
}

// backend opens the backend that --backend, LATHE_BACKEND or the machine says.
func (a *app) backend() (compute.Backend, error) { return engine.Open(a.backendName) }

// openStore opens the store of runs.
func (a *app) openStore() (*store.Store, error) {
	dir, err := store.DefaultDir()
	if err != nil {
		return nil, err
	}
	return store.Open(dir)
}

// width is the number of columns of the terminal that stdout is, or 100.
func (a *app) width() int {
	if f, ok := a.stdout.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			return w
		}
	}
	return 100
}

// interactive says whether a person watches the error stream.
func (a *app) interactive() bool {
	f, ok := a.stderr.(*os.File)
	return ok && !a.quiet && term.IsTerminal(int(f.Fd()))
}
