package quanttable

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// Contestant is a quantiser at one width.
type Contestant struct {
	Tool    string   `json:"tool"`   // "lathe", or the name of a peer
	Method  string   `json:"method"` // as --method names it
	Bits    int      `json:"bits"`   // of a weight
	ActBits int      `json:"activation_bits"`
	Flags   []string `json:"flags,omitempty"` // further arguments
}

// DenseOnly are the flags of a contestant that leaves everything but dense layers in float, as MatMulNBits of ONNX Runtime
// does.
var DenseOnly = []string{"--include", "kind:dense"}

// key names the contestant in the file that keeps finished cells.
func (c Contestant) key() string {
	return fmt.Sprintf("%s/%s/W%dA%d/%s", c.Tool, c.Method, c.Bits, c.ActBits, strings.Join(c.Flags, " "))
}

// Cell is what a contestant made of a network.
type Cell struct {
	Network string `json:"network"`
	Contestant
	Quality
	Parameters int64   `json:"parameter_bytes"` // packed codes with their scales; of peers: the file
	File       int64   `json:"file_bytes"`
	Seconds    float64 `json:"seconds"`
	PeakMB     float64 `json:"peak_mb"` // of the process
	// RuntimeCosine is the mean cosine of the outputs that ONNX Runtime (ORT_ENABLE_BASIC) and Lathe compute from the
	// exported file; 0: not compared.
	RuntimeCosine float64 `json:"runtime_cosine,omitempty"`
	Refused       string  `json:"refused,omitempty"` // why there is no such network
}

// Row is a network with its cells.
type Row struct {
	Network string  `json:"network"`
	Title   string  `json:"title"`
	Measure string  `json:"measure"`
	Cases   int     `json:"cases"`
	Float   Quality `json:"float"`
	Bytes   int64   `json:"bytes"`
	Cells   []Cell  `json:"cells"`
}

// Table is the result.
type Table struct {
	CPU      string            `json:"cpu"`
	Backend  string            `json:"backend"`
	Date     string            `json:"date"`
	Versions map[string]string `json:"versions,omitempty"` // of peers
	Rows     []Row             `json:"rows"`
}

// Options of a run.
type Options struct {
	Lathe       string // the program that compresses
	Peer        []string
	Work        string // folder for networks, examples and finished cells
	References  string // cache of reference networks
	Contestants []Contestant
	CPU         string
	Backend     string        // as users name it
	Timeout     time.Duration // of one cell; 0: 10 minutes
	Progress    func(label string, done, total int)
}

// evaluationBatch is small enough for inputs of 224 by 224 pixels.
const evaluationBatch = 16

// Run fills the table for some networks. Cells that an earlier run finished are taken from the work folder.
func Run(ctx context.Context, b compute.Backend, networks []Network, o Options) (*Table, error) {
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Minute
	}
	t := &Table{CPU: o.CPU, Backend: o.Backend, Date: time.Now().UTC().Format(time.DateOnly), Versions: map[string]string{}}
	contestants := slices.Clone(o.Contestants)
	if len(o.Peer) > 0 {
		theirs, version, err := o.variants(ctx)
		if err != nil {
			return nil, err
		}
		t.Versions[theirs[0].Tool] = version
		contestants = append(contestants, theirs...)
	}
	done, total := 0, len(networks)*(len(contestants)+1)
	step := func(label string) {
		if o.Progress != nil {
			o.Progress(label, done, total)
		}
		done++
	}
	for _, n := range networks {
		step(n.Name)
		r := &runner{Options: o, dir: filepath.Join(o.Work, n.Name)}
		if err := n.Prepare(ctx, b, r.dir, o.References); err != nil {
			return nil, err
		}
		row, err := r.begin(ctx, b, n)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name, err)
		}
		for _, c := range contestants {
			step(n.Name + " " + c.Method + " " + strconv.Itoa(c.Bits))
			cell, err := r.cell(ctx, c)
			if err != nil {
				return nil, fmt.Errorf("%s, %s at %d bits: %w", n.Name, c.Method, c.Bits, err)
			}
			cell.Network = n.Name
			row.Cells = append(row.Cells, cell)
		}
		t.Rows = append(t.Rows, *row)
	}
	return t, nil
}

// runner compresses one network.
type runner struct {
	Options
	dir         string
	calib, eval string // files, separated by commas
	judge       *judge
}

// begin evaluates the float network.
func (r *runner) begin(ctx context.Context, b compute.Backend, n Network) (*Row, error) {
	for part, list := range map[string]*string{"calib": &r.calib, "eval": &r.eval} {
		files, err := inputs(r.dir, part)
		if err != nil {
			return nil, err
		}
		*list = strings.Join(files, ",")
	}
	floats := filepath.Join(r.dir, "float.npy")
	if _, err := os.Stat(floats); errors.Is(err, fs.ErrNotExist) {
		if err := r.evaluate(ctx, b, floats); err != nil {
			return nil, err
		}
	}
	var err error
	if r.judge, err = newJudge(r.dir, floats); err != nil {
		return nil, err
	}
	row := &Row{Network: n.Name, Title: n.Title, Measure: n.Measure, Cases: r.judge.dims[0]}
	if row.Float, err = r.judge.quality(r.judge.float); err != nil {
		return nil, err
	}
	info, err := os.Stat(r.path(modelFile))
	if err != nil {
		return nil, err
	}
	row.Bytes = info.Size()
	return row, nil
}

// evaluate writes the float network's outputs on the judged cases.
func (r *runner) evaluate(ctx context.Context, b compute.Backend, path string) error {
	net, err := onnx.ReadFile(r.path(modelFile), onnx.Options{})
	if err != nil {
		return err
	}
	var x compress.Examples
	for f := range strings.SplitSeq(r.eval, ",") {
		a, err := data.ReadNPYFile(f)
		if err != nil {
			return err
		}
		x = append(x, a.Tensor())
	}
	e, err := compress.NewEvaluator(b, net, evaluationBatch)
	if err != nil {
		return err
	}
	defer e.Close()
	var values []float32
	var dims []int
	if err := e.Each(ctx, x, func(n int, out []*tensors.Tensor) error {
		dims = out[0].Shape().Dimensions
		values = append(values, nn.Floats(out[0])[:n*(out[0].Shape().Size()/dims[0])]...)
		return nil
	}); err != nil {
		return err
	}
	return data.WriteNPYFile(path, append([]int{x.Len()}, dims[1:]...), values)
}

func (r *runner) path(name string) string { return filepath.Join(r.dir, name) }

// cell compresses the network, unless that is done.
func (r *runner) cell(ctx context.Context, c Contestant) (Cell, error) {
	kept := r.path("cells.json")
	cells := map[string]Cell{}
	switch b, err := os.ReadFile(kept); {
	case err == nil:
		if err := json.Unmarshal(b, &cells); err != nil {
			return Cell{}, fmt.Errorf("%s: %w; delete it", kept, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return Cell{}, err
	}
	if cell, ok := cells[c.key()]; ok {
		return cell, nil
	}
	cell, err := r.measure(ctx, c)
	if err != nil {
		return cell, err
	}
	cells[c.key()] = cell
	return cell, atomicfile.Write(kept, func(w io.Writer) error { return json.NewEncoder(w).Encode(cells) })
}

// measure compresses the network and judges the result. A method that refuses makes a cell that says so.
func (r *runner) measure(ctx context.Context, c Contestant) (Cell, error) {
	cell := Cell{Contestant: c}
	out, outputs := r.path("out.onnx"), r.path("outputs.npy")
	var said []byte
	var err error
	var use usage
	if c.Tool == "lathe" {
		said, use, err = r.run(ctx, r.Lathe, slices.Concat([]string{
			"compress", r.path(modelFile), "--method", c.Method, "--bits", strconv.Itoa(c.Bits), "--abits", strconv.Itoa(c.ActBits), "--calib", r.calib,
			"--calib-cases", "-1", "--eval", r.eval, "-o", out, "--report", "none", "--blame", "off", "--json", "--quiet", "--save-outputs", outputs,
		}, c.Flags)...)
	} else {
		said, use, err = r.run(ctx, r.Peer[0], slices.Concat(r.Peer[1:], []string{
			"quantize", "--model", r.path(modelFile), "--calib", r.calib, "--eval", r.eval, "--variant", c.Method, "--bits", strconv.Itoa(c.Bits),
			"--out", out, "--save-outputs", outputs,
		})...)
	}
	var failed *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return cell, ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		cell.Refused = fmt.Sprintf("it took more than %s", r.Timeout)
		return cell, nil
	case errors.As(err, &failed):
		if cell.Refused = strings.TrimPrefix(lastLine(failed.Stderr), r.path(modelFile)+": "); cell.Refused == "" {
			cell.Refused = err.Error()
		}
		return cell, nil
	case err != nil:
		return cell, err
	}
	var result struct {
		Size struct {
			Parameters int64 `json:"parameters"`
		} `json:"size"`
		Seconds float64 `json:"seconds"`
		PeakMB  float64 `json:"peak_mb"`
	}
	if err := json.Unmarshal(said, &result); err != nil {
		return cell, fmt.Errorf("it printed no result: %w", err)
	}
	values, _, err := readOutputs(outputs)
	if err != nil {
		return cell, err
	}
	if cell.Quality, err = r.judge.quality(values); err != nil {
		return cell, err
	}
	info, err := os.Stat(out)
	if err != nil {
		return cell, err
	}
	cell.File, cell.Parameters, cell.Seconds, cell.PeakMB = info.Size(), result.Size.Parameters, result.Seconds, use.peakMB
	if cell.Parameters == 0 {
		cell.Parameters = cell.File
	}
	if result.PeakMB > 0 { // of the quantisation alone
		cell.PeakMB = result.PeakMB
	}
	if c.Tool == "lathe" && len(r.Peer) > 0 {
		theirs := r.path("runtime.npy")
		if _, _, err := r.run(ctx, r.Peer[0], slices.Concat(r.Peer[1:], []string{"run", "--model", out, "--eval", r.eval, "--save-outputs", theirs})...); err != nil {
			if ctx.Err() != nil {
				return cell, ctx.Err()
			}
			return cell, fmt.Errorf("the exported file does not run: %w", withStderr(err))
		}
		other, _, err := readOutputs(theirs)
		if err != nil {
			return cell, err
		}
		if cell.RuntimeCosine, err = meanCosine(values, other, r.judge.dims[0]); err != nil {
			return cell, err
		}
	}
	for _, f := range []string{out, outputs, r.path("runtime.npy")} {
		_ = os.Remove(f) // what is left is overwritten
	}
	return cell, nil
}

// meanCosine is the mean over cases of the cosine of two networks' outputs.
func meanCosine(a, b []float32, cases int) (float64, error) {
	if len(a) != len(b) || len(a)%cases != 0 {
		return 0, fmt.Errorf("%d and %d outputs of %d cases", len(a), len(b), cases)
	}
	w, sum := len(a)/cases, 0.
	for i := range cases {
		c, err := metric.Cosine(a[i*w:(i+1)*w], b[i*w:(i+1)*w])
		if err != nil {
			return 0, err
		}
		sum += c
	}
	return sum / float64(cases), nil
}

// usage is what a process took.
type usage struct{ peakMB float64 }

// run runs a program and returns what it printed.
func (r *runner) run(ctx context.Context, name string, args ...string) ([]byte, usage, error) {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.Output()
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return out, usage{peakMB: peakMB(cmd.ProcessState)}, err
}

// lastLine is what a program said last, without its name.
func lastLine(stderr []byte) string {
	lines := strings.Split(strings.TrimSpace(string(stderr)), "\n")
	return strings.TrimPrefix(strings.TrimSpace(lines[len(lines)-1]), "lathe: ")
}

func withStderr(err error) error {
	var e *exec.ExitError
	if errors.As(err, &e) && len(e.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, lastLine(e.Stderr))
	}
	return err
}

// variants asks the peer what it offers.
func (o Options) variants(ctx context.Context) ([]Contestant, string, error) {
	r := &runner{Options: o}
	said, _, err := r.run(ctx, o.Peer[0], append(slices.Clone(o.Peer[1:]), "variants")...)
	if err != nil {
		return nil, "", fmt.Errorf("peer %s: %w", strings.Join(o.Peer, " "), withStderr(err))
	}
	var v struct {
		Tool     string `json:"tool"`
		Version  string `json:"version"`
		Variants []struct {
			Name    string `json:"name"`
			Bits    int    `json:"bits"`
			ActBits int    `json:"activation_bits"`
		} `json:"variants"`
	}
	if err := json.Unmarshal(said, &v); err != nil || len(v.Variants) == 0 {
		return nil, "", fmt.Errorf("peer %s printed no variants: %w", strings.Join(o.Peer, " "), errors.Join(err, errors.New("none")))
	}
	var out []Contestant
	for _, x := range v.Variants {
		out = append(out, Contestant{Tool: v.Tool, Method: x.Name, Bits: x.Bits, ActBits: x.ActBits})
	}
	return out, v.Version, nil
}

// Best is the best cell of a tool at a width, nil if there is none. Cells that leave a part of the network out do not count.
func (r *Row) Best(lathe bool, bits int) *Cell {
	var best *Cell
	for i := range r.Cells {
		c := &r.Cells[i]
		if (c.Tool == "lathe") == lathe && c.Bits == bits && len(c.Flags) == 0 && c.Refused == "" && !math.IsNaN(c.Value) && (best == nil || c.Value > best.Value || c.Value == best.Value && c.KL < best.KL) {
			best = c
		}
	}
	return best
}
