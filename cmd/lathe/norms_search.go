package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/stat"
	expnorm "github.com/lathe-ml/lathe/lab/exp/norm"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// normFromFile reads the value of a --norm flag that names a file, a layer that "lathe norms search" wrote. It says false
// for values that name no file.
func normFromFile(value string) (n nn.Norm, isFile bool, err error) {
	if !strings.EqualFold(filepath.Ext(value), ".json") {
		return nil, false, nil
	}
	n, err = norm.ReadLayer(value)
	return n, true, err
}

type normsSearchFlags struct {
	data, images, labels       string
	space, output, report      string
	minutes                    float64
	proposals                  int
	size, width, groups        int
	batch, steps, limit, final int
	lr                         float64
	window, tournament, atOnce int
	fresh                      float64
	average, startAfter        bool
	seed                       uint64
}

func newNormsSearchCommand(a *app) *cobra.Command {
	var f normsSearchFlags
	cmd := &cobra.Command{
		Use:   "search",
		Short: "Let a norm-activation layer evolve on your images",
		Long: `Let a layer that is norm and activation in one evolve from nothing on your images (arXiv:2004.02967): graphs of basic
functions and moments are drawn at random and mutated; each is judged on three small networks (pre-activation ResNet,
MobileNetV2-like, the same with squeeze-excite). A layer that does not learn in 100 steps, whose loss is no longer
finite, or whose gradient an adversary can blow up is rejected; the others are scored by validation accuracy, and the
winners of tournaments among the newest ones have children. The best ten are trained again, wider and for longer, beside
batch norm with ReLU, and the best of them is written.

--space b allows moments over the batch (like batch norm, with running averages at inference); --space s only
statistics of each case, for small batches.

Images are a labelled data set (--data) or a folder of pictures (--images), whose classes are its subfolders, or come
from --labels, a CSV of file,label. A sixth of them validates.

Everything judged is kept beside the output (OUTPUT.search). After Ctrl-C the same command goes on from there, and a
finished search is prolonged by the same command with more --minutes or --proposals; --fresh starts over.`,
		Example: `  lathe norms search --data fashion-mnist --minutes 20 -o layer.json
  lathe norms search --images photos/ --space s --size 14 --minutes 30 -o layer.json --report search.html
  lathe norms search --data digits --proposals 300 -o layer.json
  lathe train --arch resnet8 --norm layer.json -o net.safetensors`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("proposals") && !cmd.Flags().Changed("minutes") {
				f.minutes = 0 // as many as were asked for
			}
			return a.normsSearch(cmd.Context(), f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.data, "data", "", "data set: "+strings.Join(labelledSets(), ", ")+" (default fashion-mnist)")
	fl.StringVar(&f.images, "images", "", "folder of pictures instead")
	fl.StringVar(&f.labels, "labels", "", "CSV of file,label for --images (default: the subfolders are the classes)")
	fl.StringVar(&f.space, "space", "b", "b: moments over the batch are allowed; s: only statistics of each case")
	fl.Float64Var(&f.minutes, "minutes", 20, "time for the search, of resumed runs too (0: only --proposals ends it)")
	fl.IntVar(&f.proposals, "proposals", 0, "layers to judge, rejected ones included (0: as many as there is time for)")
	fl.IntVar(&f.size, "size", 7, "side in pixels to which the images are reduced")
	fl.IntVar(&f.width, "width", 6, "channels of the first stage of the small networks")
	fl.IntVar(&f.groups, "groups", 2, "groups of channels of the moments over groups")
	fl.IntVar(&f.batch, "batch", 32, "images per training step")
	fl.IntVar(&f.steps, "steps", 100, "training steps of a layer on each network")
	fl.Float64Var(&f.lr, "lr", 0.1, "learning rate of SGD with momentum")
	fl.IntVar(&f.limit, "limit", 7000, "use at most so many images, drawn by class")
	fl.IntVar(&f.final, "final", 10, "best layers that are trained again, twice as wide and three times as long")
	fl.IntVar(&f.window, "window", 200, "newest accepted layers that can have children")
	fl.IntVar(&f.tournament, "tournament", 50, "of them that compete to have one")
	fl.Float64Var(&f.fresh, "random", 0.2, "share of proposals that are new random layers")
	fl.IntVar(&f.atOnce, "parallel", 2, "layers judged at once; another number is another search")
	fl.BoolVar(&f.average, "average", false, "the best mean wins a tournament (default: any layer of its Pareto front)")
	fl.Uint64Var(&f.seed, "seed", 0, "of everything random")
	fl.StringVarP(&f.output, "output", "o", "", "layer to write (.json)")
	fl.StringVar(&f.report, "report", "", "draw the search's log and Pareto front in an HTML file")
	fl.BoolVar(&f.startAfter, "fresh", false, "forget what was judged and start over")
	_ = cmd.MarkFlagRequired("output")
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	_ = cmd.RegisterFlagCompletionFunc("space", oneOf("b", "s"))
	return cmd
}

func (f *normsSearchFlags) check() error {
	positive := func(v float64) bool { return v > 0 && !math.IsInf(v, 0) }
	switch {
	case f.data != "" && f.images != "":
		return usageErrorf("--data and --images: give one of them")
	case f.labels != "" && f.images == "":
		return usageErrorf("--labels belongs to --images")
	case f.space != "b" && f.space != "s":
		return chooseOne("space", f.space, []string{"b", "s"})
	case !strings.EqualFold(filepath.Ext(f.output), ".json"):
		return usageErrorf("-o %q: the name must end in .json", f.output)
	case f.minutes != 0 && !positive(f.minutes) || f.minutes > 1e6 || f.proposals < 0:
		return usageErrorf("--minutes %g, --proposals %d: must be 0 or more", f.minutes, f.proposals)
	case f.minutes == 0 && f.proposals == 0:
		return usageErrorf("--minutes 0 without --proposals: something must end the search")
	case f.size < 4 || f.size > 64:
		return usageErrorf("--size %d: must be 4 to 64 pixels", f.size)
	case f.width < 1 || f.width > 256 || f.groups < 1 || f.groups > 256:
		return usageErrorf("--width %d, --groups %d: must be 1 to 256", f.width, f.groups)
	case f.batch < 1 || f.batch > 4096 || f.steps < 1 || f.steps > 1e6:
		return usageErrorf("--batch %d, --steps %d: must be 1 to 4096 and 1 to 1000000", f.batch, f.steps)
	case !positive(f.lr):
		return usageErrorf("--lr %g: must be positive", f.lr)
	case f.limit < 1 || f.final < 1:
		return usageErrorf("--limit %d, --final %d: must be positive", f.limit, f.final)
	case f.window < 1 || f.tournament < 1 || f.atOnce < 1 || f.atOnce > 64:
		return usageErrorf("--window %d, --tournament %d, --parallel %d: must be positive, at most 64 at once", f.window, f.tournament, f.atOnce)
	case !(f.fresh >= 0 && f.fresh <= 1):
		return usageErrorf("--random %g: is a share from 0 to 1", f.fresh)
	}
	if st, err := os.Stat(filepath.Dir(f.output)); err != nil || !st.IsDir() {
		return fmt.Errorf("-o %q: there is no folder %q", f.output, filepath.Dir(f.output))
	}
	return nil
}

// foundLayer is a layer with its accuracies in percent.
type foundLayer struct {
	Formula  string    `json:"formula"`
	Proposal int       `json:"proposal"`
	Search   []float64 `json:"search"`          // by network, as the search trained it
	Final    []float64 `json:"final,omitempty"` // twice as wide, three times as long
}

type normsSearchResult struct {
	Output    string         `json:"output"`
	Best      foundLayer     `json:"best"`
	Baseline  foundLayer     `json:"baseline"` // the same networks with batch norm and ReLU
	Networks  []string       `json:"networks"`
	Ranked    []foundLayer   `json:"ranked"`
	Front     []foundLayer   `json:"front"` // no other layer is better on all networks
	Proposals int            `json:"proposals"`
	Verdicts  map[string]int `json:"verdicts"`
	Seconds   float64        `json:"seconds"` // of judging, of resumed runs too
	Archive   string         `json:"archive"`
	Report    string         `json:"report,omitempty"`
}

func (a *app) normsSearch(ctx context.Context, f normsSearchFlags) error {
	if err := f.check(); err != nil {
		return err
	}
	backend, err := a.backend()
	if err != nil {
		return err
	}
	sets, err := f.load(ctx)
	if err != nil {
		return err
	}
	o := norm.SearchOptions{
		Space: norm.Space{Batch: f.space == "b"},
		Proxy: norm.ProxyOptions{Layer: norm.EvoOptions{Groups: f.groups}, Batch: f.batch, LR: f.lr, Steps: f.steps, Cosine: f.space == "s", Seed: f.seed},
		// The last tenth of the time is for training the best layers again.
		Budget: time.Duration(.9 * f.minutes * float64(time.Minute)), Proposals: f.proposals,
		Window: f.window, Tournament: min(f.tournament, f.window), Fresh: f.fresh, Average: f.average, Novel: true, Parallel: f.atOnce,
		Seed: f.seed, Archive: f.output + ".search",
	}
	if o.Fresh == 0 {
		o.Fresh = -1
	}
	if o.Proposals == 0 {
		o.Proposals = math.MaxInt32
	}
	if f.startAfter {
		if err := os.Remove(o.Archive); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if _, err := os.Stat(o.Archive); err == nil {
		a.note("going on from %s", o.Archive)
	}
	archs := func(width int) []norm.Arch {
		return norm.ProxyArchs(sets.Train.H, sets.Train.C, sets.Train.Classes(), width)
	}
	batchNorm := zoo.NormAct{Norm: nn.BatchNorm{}}
	proxy, err := norm.NewProxy(backend, archs(f.width), sets, o.Proxy)
	if err != nil {
		return err
	}
	r := normsSearchResult{Output: f.output, Networks: proxy.Archs(), Archive: o.Archive, Report: f.report, Verdicts: map[string]int{}}
	base, err := proxy.Train(ctx, batchNorm)
	if err != nil {
		return err
	}
	r.Baseline = foundLayer{Formula: "batch norm, ReLU", Proposal: -1, Search: percent(base)}

	bar := a.progress("searching")
	defer bar.Close()
	best := 0.
	o.Observe = func(p norm.Proposal, s *norm.SearchResult) {
		if p.Verdict == norm.Accepted && p.Mean() > best {
			best = p.Mean()
			line := fmt.Sprintf("%6.0f s  layer %d: %.1f %%  %s", s.Seconds, p.Number, 100*best, p.Formula)
			if bar != nil {
				bar.Println(line)
			} else {
				a.note("%s", line)
			}
		}
		bar.Label(fmt.Sprintf("searching: %d judged, %d accepted, best %.1f %% (batch norm %.1f %%)", p.Number+1, s.Count(norm.Accepted), 100*best, 100*stat.Mean(base)))
		if f.proposals > 0 {
			bar.Set(p.Number+1, f.proposals)
		} else {
			bar.Set(int(s.Seconds), int(o.Budget.Seconds()))
		}
	}
	found, err := norm.Search(ctx, backend, archs(f.width), sets, o)
	if err != nil {
		return err
	}
	if found.Note != "" {
		a.note("%s", found.Note)
	}
	r.Proposals, r.Seconds = len(found.Proposals), found.Seconds
	for _, p := range found.Proposals {
		r.Verdicts[p.Verdict]++
	}
	if len(found.Best(1)) == 0 {
		return fmt.Errorf("none of %d layers passed the tests in %.0f s; the same command with more --minutes or --proposals goes on from there", r.Proposals, r.Seconds)
	}

	wide := o.Proxy
	wide.Steps, wide.QualitySteps, wide.Cosine = 3*f.steps, 0, true
	final, err := norm.NewProxy(backend, archs(2*f.width), sets, wide)
	if err != nil {
		return err
	}
	bar.Label("training the best layers again")
	if base, err = final.Train(ctx, batchNorm); err != nil {
		return err
	}
	r.Baseline.Final = percent(base)
	ranked, err := norm.Rerank(ctx, final, found, f.final, bar.Set)
	bar.Close()
	if err != nil {
		return err
	}
	for _, l := range ranked {
		r.Ranked = append(r.Ranked, foundLayer{l.Formula, l.Number, percent(l.Scores), percent(l.Final)})
	}
	for _, p := range found.Front() {
		r.Front = append(r.Front, foundLayer{p.Formula, p.Number, percent(p.Scores), nil})
	}
	r.Best = r.Ranked[0]
	scores := map[string]float64{}
	for i, name := range r.Networks {
		scores[name] = ranked[0].Final[i]
		scores["batch norm and ReLU: "+name] = base[i]
	}
	if err := norm.WriteLayer(f.output, ranked[0].Layer, o.Proxy.Layer, scores); err != nil {
		return err
	}
	if f.report != "" {
		if err := r.document(found, append([]string{"lathe"}, a.args...)).Save(f.report); err != nil {
			return err
		}
	}
	return a.emit(r, func(w io.Writer) error { return r.document(nil, nil).WriteText(w, a.width()) })
}

func percent(v []float64) []float64 {
	out := make([]float64, len(v))
	for i, x := range v {
		out[i] = math.Round(1e4*x) / 100
	}
	return out
}

// document lays the result out; the log and the front are drawn when the search itself is given.
func (r normsSearchResult) document(found *norm.SearchResult, command []string) *report.Document {
	gain := stat.Mean(r.Best.Final) - stat.Mean(r.Baseline.Final)
	d := &report.Document{
		Title: "y = " + r.Best.Formula,
		Subtitle: fmt.Sprintf("The best of %d layers: %+.1f points against batch norm with ReLU (%.1f and %.1f %% on average), after %.0f s. Written to %s; gain and bias are learned beside it.",
			r.Proposals, gain, stat.Mean(r.Best.Final), stat.Mean(r.Baseline.Final), r.Seconds, r.Output),
	}
	row := func(l foundLayer, v []float64) []string {
		cells := []string{l.Formula}
		for _, x := range v {
			cells = append(cells, fmt.Sprintf("%.1f", x))
		}
		return append(cells, fmt.Sprintf("%.1f", stat.Mean(v)))
	}
	columns := append(append([]string{"layer"}, r.Networks...), "mean")
	ranked := report.Table{Title: "Trained again, twice as wide and three times as long: accuracy in %", Columns: columns, Rows: [][]string{row(r.Baseline, r.Baseline.Final)}}
	for _, l := range r.Ranked {
		ranked.Rows = append(ranked.Rows, row(l, l.Final))
	}
	front := report.Table{Title: "Pareto front of the search: accuracy in %", Columns: columns, Rows: [][]string{row(r.Baseline, r.Baseline.Search)}, Note: "No other layer is better on all networks."}
	for i, l := range r.Front {
		if i == 12 {
			front.Note = fmt.Sprintf("The first 12 of %d; no other layer is better on all networks.", len(r.Front))
			break
		}
		front.Rows = append(front.Rows, row(l, l.Search))
	}
	verdicts := report.Table{Title: "What became of the proposals", Columns: []string{"verdict", "layers"}}
	for _, v := range []struct{ verdict, text string }{
		{norm.Accepted, "accepted"},
		{norm.ByStatic, "rejected: ignores its input"},
		{norm.ByQuality, "rejected: does not learn"},
		{norm.ByNaN, "rejected: the loss is no longer finite"},
		{norm.ByStability, "rejected: the gradient can be blown up"},
		{norm.ByTimeout, "rejected: takes too long"},
		{norm.ByError, "rejected: cannot be computed"},
	} {
		if n := r.Verdicts[v.verdict]; n > 0 {
			verdicts.Rows = append(verdicts.Rows, []string{v.text, fmt.Sprint(n)})
		}
	}
	d.Add(ranked, front, verdicts)
	if found != nil {
		d.Add(
			report.Images{Title: "Log of the search: every proposal", Pictures: []report.Picture{{Image: expnorm.SearchLogPicture(found)}}},
			report.Images{Title: "Pareto front", Pictures: []report.Picture{{Image: expnorm.SearchFrontPicture(found)}}},
		)
		d.Facts = []report.Fact{{Name: "Command", Value: strings.Join(command, " ")}}
	}
	return d
}

// load reads the images and splits them.
func (f *normsSearchFlags) load(ctx context.Context) (d norm.ProxyData, err error) {
	var all *data.Images
	if f.images != "" {
		all, err = f.pictures(ctx)
	} else {
		if f.data == "" {
			f.data = "fashion-mnist"
		}
		var l labelled
		l, err = loadLabelled(ctx, f.data, true)
		all = l.Images
	}
	if err != nil {
		return d, err
	}
	drawn, _, err := all.Stratified(min(f.limit, all.N), f.seed)
	if err != nil {
		return d, err
	}
	if all, err = all.Subset(drawn); err != nil {
		return d, err
	}
	if f.images == "" {
		if all.H != all.W {
			return d, fmt.Errorf("the images of %s are %d×%d; want squares", f.data, all.W, all.H)
		}
		for all.H >= 2*f.size {
			all = all.Pool2()
		}
	}
	validate, train, err := all.Stratified(max(1, all.N/7), f.seed)
	if err != nil {
		return d, err
	}
	if d.Train, err = all.Subset(train); err != nil {
		return d, err
	}
	d.Validation, err = all.Subset(validate)
	if err == nil && d.Train.N < f.batch {
		err = usageErrorf("--batch %d: there are only %d training images", f.batch, d.Train.N)
	}
	return d, err
}

// pictures reads a folder of pictures, reduced to the search's size.
func (f *normsSearchFlags) pictures(ctx context.Context) (*data.Images, error) {
	files, err := data.ReadImageDir(f.images)
	if err != nil {
		return nil, err
	}
	var labels []data.Label
	if f.labels != "" {
		if labels, err = data.ReadLabelsFile(f.labels); err != nil {
			return nil, err
		}
	} else {
		for _, name := range files {
			class, _, ok := strings.Cut(name, "/")
			if !ok {
				return nil, usageErrorf("%s: picture %q is in no subfolder, which would be its class; give --labels", f.images, name)
			}
			labels = append(labels, data.Label{File: name, Class: class})
		}
	}
	m := &data.Images{H: f.size, W: f.size, C: 3}
	if m.Labels, m.ClassNames, err = data.JoinLabels(files, labels); err != nil {
		return nil, err
	}
	if f.limit < len(files) { // read only those that are used
		index := &data.Images{N: len(files), H: 0, W: 0, C: 0, Labels: m.Labels, ClassNames: m.ClassNames}
		keep, _, err := index.Stratified(f.limit, f.seed)
		if err != nil {
			return nil, err
		}
		some := make([]string, len(keep))
		kept := make([]int32, len(keep))
		for i, k := range keep {
			some[i], kept[i] = files[k], m.Labels[k]
		}
		files, m.Labels = some, kept
	}
	p := preprocessing{resizeExact: [2]int{f.size, f.size}, crop: [2]int{f.size, f.size}, mean: []float64{0, 0, 0}, std: []float64{1, 1, 1}, channels: "rgb", layout: "nhwc", scale: 255}
	m.N = len(files)
	m.Pixels = make([]uint8, 0, m.N*f.size*f.size*3)
	row := make([]float32, f.size*f.size*3)
	for _, name := range files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		path := filepath.Join(f.images, filepath.FromSlash(name))
		img, _, err := data.ReadImage(path)
		if err != nil {
			return nil, err
		}
		if err := p.apply(img, row); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, v := range row {
			m.Pixels = append(m.Pixels, uint8(min(max(math.Round(float64(v)), 0), 255)))
		}
	}
	if len(m.ClassNames) < 2 {
		return nil, usageErrorf("%s: all pictures are of class %q; want at least 2 classes", f.images, strings.Join(m.ClassNames, ""))
	}
	return m, nil
}
