package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// journalVersion changes when finished pieces of an earlier program must not be taken over.
const journalVersion = "lathe compress 2"

// materialKey hashes what the results depend on beside the recipe: the model's bytes, how it was read, the calibration
// cases with the classes that are learnt from, the batch and the backend.
func (c *compression) materialKey(m *material) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%q %d %d %s\n", journalVersion, c.shapes, c.tokens, m.batch, m.backend.Name())
	if err := hashModel(h, c.model); err != nil {
		return "", err
	}
	if err := hashExamples(h, m.examples); err != nil {
		return "", err
	}
	if m.classes != nil {
		fmt.Fprint(h, m.classes)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// openJournal opens the journal of this run, which an earlier one may have left.
func (c *compression) openJournal(m *material, what any) (*compress.Journal, error) {
	text := fmt.Sprintf("%+v", what)
	if r, ok := what.(*compress.Recipe); ok {
		b, err := r.Marshal()
		if err != nil {
			return nil, err
		}
		text = string(b)
	}
	sum := sha256.Sum256([]byte(m.key + text))
	return c.app.openJournal("compress", hex.EncodeToString(sum[:]))
}

// apply runs a recipe's steps over the network, one after the other.
func (c *compression) apply(ctx context.Context, m *material, r *compress.Recipe, journal *compress.Journal) (*compress.Result, error) {
	sites, err := r.Assign(m.net)
	if err != nil {
		return nil, err
	}
	whole := len(r.Steps) == 1 && len(r.Steps[0].Include)+len(r.Steps[0].Exclude) == 0
	var res *compress.Result
	net, ref := m.net, m.net
	of := map[string]compress.Site{}
	for i, s := range r.Steps {
		row, err := findCompressor(s.Method)
		if err != nil {
			return nil, err
		}
		sub, err := journal.Sub(fmt.Sprintf("step-%d", i+1))
		if err != nil {
			return nil, err
		}
		steps := c.reporter(s.Method, i, len(r.Steps))
		o := compress.Options{Seed: r.Seed, Journal: sub, Progress: steps.step}
		if !whole {
			o.Select = func(n *nn.Node) bool { return sites[i][n.Name] }
		}
		step, err := row.method(s, o, m.batch, m.classes).Compress(ctx, m.backend, net, m.examples)
		steps.close()
		if errors.Is(err, quant.ErrNoClasses) {
			err = fmt.Errorf("%w: --set %s=false", err, classesKnob)
		}
		if err != nil {
			if len(r.Steps) > 1 {
				err = fmt.Errorf("step %d: %w", i+1, err)
			}
			return nil, err
		}
		for _, site := range step.Sites {
			if sites[i][site.Name] {
				of[site.Name] = site
			}
		}
		if res == nil {
			res, ref = step, step.Reference
		} else {
			if norms(step.Reference) < norms(net) {
				ref = ref.Clone()
				if _, err := fold.BatchNorm(ref); err != nil {
					return nil, err
				}
			}
			res = &compress.Result{Network: step.Network, Sites: step.Sites, Notes: append(res.Notes, step.Notes...)}
		}
		net = step.Network
	}
	res.Reference = ref
	if len(r.Steps) > 1 {
		if err := c.siteErrors(ctx, m, res, of); err != nil {
			return nil, err
		}
	}
	for i := range res.Sites { // JSON knows no infinity
		for _, v := range []*float64{&res.Sites[i].OutputErr, &res.Sites[i].WeightErr} {
			if math.IsInf(*v, 0) || math.IsNaN(*v) {
				*v = math.MaxFloat64
			}
		}
	}
	return res, nil
}

// norms counts batch norms.
func norms(net *nn.Network) (n int) {
	for _, x := range net.Nodes {
		if _, ok := x.Op.(nn.BatchNorm); ok {
			n++
		}
	}
	return n
}

// siteErrors completes the sites of a recipe of several steps: weight errors are those of the step that took the site,
// output errors those of the whole network.
func (c *compression) siteErrors(ctx context.Context, m *material, res *compress.Result, of map[string]compress.Site) error {
	var values []string
	var at []int
	for i := range res.Sites {
		s := &res.Sites[i]
		if done, ok := of[s.Name]; ok {
			s.WeightErr, s.OutputErr = done.WeightErr, done.OutputErr
		}
		n := res.Network.Node(s.Name)
		if n != nil && res.Reference.Producer(n.Out[0]) != nil {
			values, at = append(values, n.Out[0]), append(at, i)
		}
	}
	if m.examples == nil || len(values) == 0 {
		return nil
	}
	errs, err := compress.SiteErrors(ctx, m.backend, res.Reference, res.Network, m.examples, min(m.batch, m.examples.Len()), values)
	if err != nil {
		return err
	}
	for k, i := range at {
		res.Sites[i].OutputErr = errs[k]
	}
	return nil
}

// siteReporter tells the user of every finished site: a bar on a terminal, a line elsewhere.
type siteReporter struct {
	*app
	label string
	bar   *progressBar
	lines bool
}

func (c *compression) reporter(method string, step, steps int) *siteReporter {
	r := &siteReporter{app: c.app, label: method}
	if steps > 1 {
		r.label = fmt.Sprintf("step %d of %d, %s", step+1, steps, method)
	}
	if r.lines = !c.quiet && (c.verbose || !c.interactive()); !r.lines {
		r.bar = c.progress(r.label)
	}
	return r
}

func (r *siteReporter) step(s compress.Step) {
	text := s.Site
	if s.Bytes > 0 {
		text += ", " + report.Bytes(s.Bytes)
	}
	if s.Err > 0 {
		text += ", error " + report.Number(s.Err)
	}
	if s.Restored {
		text += ", from the earlier run"
	}
	if r.lines {
		fmt.Fprintf(r.stderr, "%s %d/%d: %s\n", r.label, s.Done, s.Total, text)
		return
	}
	r.bar.Label(text)
	r.bar.Set(s.Done, s.Total)
}

func (r *siteReporter) close() { r.bar.Close() }

// parseBytes reads a size: 500MB, 1.5 GiB, 80000.
func parseBytes(s string) (int64, error) {
	s = strings.TrimSpace(s)
	i := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	unit := ""
	if i >= 0 {
		s, unit = s[:i], strings.ToLower(strings.TrimSpace(s[i:]))
	}
	factor, ok := map[string]float64{
		"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "k": 1e3, "m": 1e6, "g": 1e9,
		"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
	}[unit]
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || !ok || !(v > 0) || v*factor > 1<<60 {
		return 0, errors.New("write a size such as 500MB or 2GiB")
	}
	return int64(v * factor), nil
}
