package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"image"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/curate"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/stat"
)

type curateFlags struct {
	keep, balance                     float64
	method, mode                      string
	labels, test, testLabels, output  string
	clusters, models, epochs, perItem int
	seed                              uint64
}

func newCurateCommand(a *app) *cobra.Command {
	var f curateFlags
	cmd := &cobra.Command{
		Use:   "curate FEATURES.npy|FEATURES.csv|IMAGEDIR",
		Short: "Rank training examples by difficulty and keep the ones that matter",
		Long: `Rank the examples of a training set by difficulty and say which to keep (data pruning, arXiv:2206.14486).

The examples are the rows of a feature matrix [examples, features] - embeddings of any network, best of one
trained without labels - or the pictures of a folder, which are embedded by their pooled pixels. Scores have one
orientation: high = hard. Keep hard examples when data are plentiful and easy ones when they are scarce
(--mode auto: easy below 100 examples per class or cluster, see --per-class).

` + methodList() + `
The methods that need labels train small linear classifiers on the features. Labels are a CSV of file,label for
pictures; of row,label (rows from 0), or of one label a line, for a matrix; or an .npy of integers.

The output has the columns index, file, score, cluster and kept (1 or 0), best-ranked first.`,
		Example: `  lathe curate photos/ --keep 0.7 -o ranked.csv
  lathe curate embeddings.npy --keep 0.8 --clusters 100 -o ranked.csv
  lathe curate embeddings.npy --method el2n --labels labels.csv --keep 0.6 -o ranked.csv
  lathe curate theory --alpha 20 --keep 0.2       what theory expects of it`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErrorf("curate needs one feature file or folder of pictures, and got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return runCurate(cmd.Context(), a, args[0], f) },
	}
	fl := cmd.Flags()
	fl.Float64Var(&f.keep, "keep", 0.7, "share of the examples to keep, above 0 and at most 1")
	fl.StringVar(&f.method, "method", "prototypes", "how difficulty is measured: "+strings.Join(curate.MetricNames(), ", "))
	fl.StringVar(&f.mode, "mode", "hard", "which end of the ranking is kept: hard, easy or auto")
	fl.IntVar(&f.perItem, "per-class", 100, "examples per class (or cluster) below which --mode auto keeps easy ones")
	fl.Float64Var(&f.balance, "balance", 0.5, "share of the kept examples dealt out evenly over classes (or clusters), 0 to 1")
	fl.StringVar(&f.labels, "labels", "", "labels of the examples (CSV or .npy)")
	fl.StringVar(&f.test, "test", "", "features of test examples (for influence-max and influence-sum-abs)")
	fl.StringVar(&f.testLabels, "test-labels", "", "labels of the test examples")
	fl.IntVar(&f.clusters, "clusters", 0, "number of prototypes: about 1 to 10 times the number of classes (default 20)")
	fl.IntVar(&f.models, "models", 0, "number of classifiers of the methods that train some (default 10 for el2n, 20 for subset methods)")
	fl.IntVar(&f.epochs, "epochs", 0, "epochs of each classifier (default 2 for el2n, 8 for forgetting, 10 for subset methods)")
	fl.Uint64Var(&f.seed, "seed", 0, "seed of everything random")
	fl.StringVarP(&f.output, "output", "o", "", "write the ranking here; - for standard output; without it only the summary is printed")
	_ = cmd.RegisterFlagCompletionFunc("method", cobra.FixedCompletions(curate.MetricNames(), cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions([]string{"hard", "easy", "auto"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(newCurateTheoryCommand(a))
	return cmd
}

func methodList() string {
	var b strings.Builder
	b.WriteString("Methods (* needs --labels):\n")
	for _, name := range curate.MetricNames() {
		about, labels := curate.DescribeMetric(name)
		star := " "
		if labels {
			star = "*"
		}
		fmt.Fprintf(&b, "  %-22s%s %s\n", name, star, about)
	}
	return b.String()
}

// curateReport is what curate prints as JSON.
type curateReport struct {
	Input    string        `json:"input"`
	Method   string        `json:"method"`
	Mode     curate.Mode   `json:"mode"`
	Examples int           `json:"examples"`
	Features int           `json:"features"`
	Kept     int           `json:"kept"`
	Keep     float64       `json:"keep"`
	Balance  float64       `json:"balance"`
	Seed     uint64        `json:"seed"`
	Score    curateScore   `json:"score"`
	Grouping string        `json:"grouping,omitempty"` // "class" or "cluster"
	Groups   []curateGroup `json:"groups,omitempty"`
	Output   string        `json:"output,omitempty"`
}

type curateScore struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
	// Border is the score of the last example that is kept by rank.
	Border float64 `json:"border"`
}

type curateGroup struct {
	Name     string  `json:"name"`
	Examples int     `json:"examples"`
	Kept     int     `json:"kept"`
	Score    float64 `json:"mean_score"`
}

func runCurate(ctx context.Context, a *app, input string, f curateFlags) error {
	if !(f.keep > 0 && f.keep <= 1) {
		return usageErrorf("--keep %g; it is the share of examples that stays, above 0 and at most 1", f.keep)
	}
	if !(f.balance >= 0 && f.balance <= 1) {
		return usageErrorf("--balance %g; it lies between 0 and 1", f.balance)
	}
	for _, v := range []struct {
		name string
		n    int
	}{{"clusters", f.clusters}, {"models", f.models}, {"epochs", f.epochs}, {"per-class", f.perItem}} {
		if v.n < 0 {
			return usageErrorf("--%s %d; it must not be negative", v.name, v.n)
		}
	}
	mode := curate.Hard
	if f.mode != "auto" {
		var err error
		if mode, err = curate.ParseMode(f.mode); err != nil {
			return usageErrorf("--mode %q; accepted: hard, easy, auto", f.mode)
		}
	}
	metric, err := curate.NewMetric(f.method, curate.Options{Clusters: f.clusters, Models: f.models, Epochs: f.epochs, Seed: f.seed})
	if err != nil {
		return usageErrorf("%v", err)
	}
	if _, needs := curate.DescribeMetric(f.method); needs && f.labels == "" {
		return usageErrorf("--method %s needs --labels; prototypes and random work without", f.method)
	}
	if a.json && f.output == "-" {
		return usageErrorf("--json and -o - both write to standard output; name a file")
	}
	if (f.test == "") != (f.testLabels == "") {
		return usageErrorf("--test and --test-labels go together")
	}

	e, files, err := readExamples(ctx, a, input)
	if err != nil {
		return err
	}
	var classes []string
	if f.labels != "" {
		if e.Labels, classes, err = readExampleLabels(f.labels, files, e.Len()); err != nil {
			return err
		}
	}
	if f.test != "" {
		if e.TestFeatures, err = readFeatures(f.test); err != nil {
			return err
		}
		n, _ := e.TestFeatures.Dims()
		var names []string
		if e.TestLabels, names, err = readExampleLabels(f.testLabels, nil, n); err != nil {
			return err
		}
		if !slices.Equal(names, classes) && !isPrefix(names, classes) {
			return fmt.Errorf("%s: its classes %v are not those of %s, %v", f.testLabels, clipped(names), f.labels, clipped(classes))
		}
	}

	ranking, err := metric.Rank(ctx, e)
	if err != nil {
		return err
	}
	var cluster []int
	if ranking.Clusters != nil {
		cluster = ranking.Clusters.Assignment
	}
	groups, grouping := e.Labels, "class"
	if groups == nil {
		groups, grouping = cluster, "cluster"
	}
	count := 1
	if groups == nil {
		grouping = ""
	} else {
		count = len(slices.Compact(slices.Sorted(slices.Values(groups))))
	}
	if f.mode == "auto" {
		mode = curate.Auto(e.Len(), count, f.perItem)
	}
	kept, err := curate.Select(ranking.Score, groups, f.keep, f.balance, mode)
	if err != nil {
		return err
	}

	_, dims := e.Features.Dims()
	r := curateReport{
		Input: input, Method: f.method, Mode: mode, Examples: e.Len(), Features: dims, Kept: len(kept), Keep: f.keep, Balance: f.balance,
		Seed: f.seed, Grouping: grouping, Output: f.output,
		Score: curateScore{Min: slices.Min(ranking.Score), Median: stat.Median(ranking.Score), Max: slices.Max(ranking.Score)},
	}
	in := make([]bool, e.Len())
	r.Score.Border = math.Inf(1)
	if mode == curate.Easy {
		r.Score.Border = math.Inf(-1)
	}
	for _, i := range kept {
		in[i] = true
		if mode == curate.Hard {
			r.Score.Border = min(r.Score.Border, ranking.Score[i])
		} else {
			r.Score.Border = max(r.Score.Border, ranking.Score[i])
		}
	}
	r.Groups = groupSummary(groups, classes, ranking.Score, in)

	write := func(w io.Writer) error { return writeRanking(w, files, ranking.Score, cluster, in, mode) }
	switch f.output {
	case "":
	case "-":
		return write(a.stdout)
	default:
		if err := atomicfile.Write(f.output, write); err != nil {
			return err
		}
	}
	return a.emit(r, func(w io.Writer) error { return r.print(w) })
}

func isPrefix(a, b []string) bool { return len(a) <= len(b) && slices.Equal(a, b[:len(a)]) }

func clipped(names []string) []string {
	if len(names) > 10 {
		return append(slices.Clone(names[:10]), "...")
	}
	return names
}

// readExamples reads a feature matrix, or embeds a folder of pictures, whose names it returns.
func readExamples(ctx context.Context, a *app, path string) (*curate.Examples, []string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if !info.IsDir() {
		x, err := readFeatures(path)
		return &curate.Examples{Features: x}, nil, err
	}
	files, err := data.ReadImageDir(path)
	if err != nil {
		return nil, nil, err
	}
	bar := a.progress("reading pictures")
	defer bar.Close()
	x, err := curate.ImageFeatures(ctx, len(files), 0, func(i int) (image.Image, error) {
		img, _, err := data.ReadImage(filepath.Join(path, filepath.FromSlash(files[i])))
		bar.Set(i+1, len(files))
		return img, err
	})
	return &curate.Examples{Features: x}, files, err
}

// readFeatures reads a matrix [examples, ...] from .npy, whose axes after the first are flattened, or from CSV.
func readFeatures(path string) (*mat.Dense, error) {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".npy":
		v, err := data.ReadNPYFile(path)
		if err != nil {
			return nil, err
		}
		if len(v.Shape) < 2 || v.Len() == 0 {
			return nil, fmt.Errorf("%s: its shape is %v; want [examples, features] with at least one of each", path, v.Shape)
		}
		return mat.NewDense(v.Shape[0], v.Len()/v.Shape[0], v.Float64s()), nil
	case ".csv", ".tsv", ".txt":
		t, err := data.ReadCSVFile(path)
		if err != nil {
			return nil, err
		}
		return mat.NewDense(t.Rows, t.Cols, t.Data), nil
	}
	return nil, usageErrorf("%s: features are read from .npy and .csv files, or from a folder of pictures", path)
}

// readExampleLabels reads the labels of n examples, numbered as data.JoinLabels does.
func readExampleLabels(path string, files []string, n int) (labels []int, classes []string, err error) {
	if strings.EqualFold(filepath.Ext(path), ".npy") {
		v, err := data.ReadNPYFile(path)
		if err != nil {
			return nil, nil, err
		}
		if v.Len() != n {
			return nil, nil, fmt.Errorf("%s: %d labels for %d examples", path, v.Len(), n)
		}
		labels = make([]int, n)
		for i, x := range v.Float64s() {
			if x != math.Trunc(x) || x < 0 || x >= 1<<16 {
				return nil, nil, fmt.Errorf("%s: label %g of example %d; want whole numbers from 0 to %d", path, x, i, 1<<16-1)
			}
			labels[i] = int(x)
		}
		classes = make([]string, slices.Max(labels)+1)
		for i := range classes {
			classes[i] = strconv.Itoa(i)
		}
		return labels, classes, nil
	}

	names := files
	if names == nil {
		names = make([]string, n)
		for i := range names {
			names[i] = strconv.Itoa(i)
		}
	}
	list, err := data.ReadLabelsFile(path)
	if err != nil {
		if lines, e := readLines(path); e == nil && files == nil && lines != nil {
			if len(lines) == n+1 && strings.EqualFold(lines[0], "label") {
				lines = lines[1:]
			}
			if len(lines) != n {
				return nil, nil, fmt.Errorf("%s: %d labels for %d examples", path, len(lines), n)
			}
			list, err = make([]data.Label, n), nil
			for i, l := range lines {
				list[i] = data.Label{File: names[i], Class: l}
			}
		}
	}
	if err != nil {
		return nil, nil, err
	}
	y, classes, err := data.JoinLabels(names, list)
	if err != nil {
		if files == nil {
			return nil, nil, fmt.Errorf("%s: %w; for a feature matrix its lines are row,label with rows from 0 to %d, or one label a line", path, err, n-1)
		}
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	labels = make([]int, n)
	for i, l := range y {
		labels[i] = int(l)
	}
	return labels, classes, nil
}

// readLines returns the lines of a file of one column; nil when a line has more.
func readLines(path string) (out []string, err error) {
	in, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	s := bufio.NewScanner(in)
	for s.Scan() {
		l := strings.TrimSpace(strings.TrimPrefix(s.Text(), "\ufeff"))
		if strings.ContainsAny(l, ",;\t") {
			return nil, nil
		}
		if l != "" {
			out = append(out, l)
		}
	}
	return out, s.Err()
}

func groupSummary(groups []int, names []string, score []float64, kept []bool) []curateGroup {
	byGroup := map[int]*curateGroup{}
	for i, g := range groups {
		s := byGroup[g]
		if s == nil {
			s = &curateGroup{Name: strconv.Itoa(g)}
			if g < len(names) {
				s.Name = names[g]
			}
			byGroup[g] = s
		}
		s.Examples++
		s.Score += score[i]
		if kept[i] {
			s.Kept++
		}
	}
	var order []int
	for g, s := range byGroup {
		s.Score /= float64(s.Examples)
		order = append(order, g)
	}
	slices.Sort(order)
	var out []curateGroup
	for _, g := range order {
		out = append(out, *byGroup[g])
	}
	return out
}

// writeRanking writes the examples, the ones to keep first by rank in front.
func writeRanking(w io.Writer, files []string, score []float64, cluster []int, kept []bool, mode curate.Mode) error {
	order := make([]int, len(score))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		d := score[b] - score[a]
		if mode == curate.Easy {
			d = -d
		}
		switch {
		case d < 0:
			return -1
		case d > 0:
			return 1
		}
		return 0
	})
	b := bufio.NewWriter(w)
	fmt.Fprintln(b, "index,file,score,cluster,kept")
	for _, i := range order {
		file, c, k := "", "", "0"
		if files != nil {
			file = csvField(files[i])
		}
		if cluster != nil {
			c = strconv.Itoa(cluster[i])
		}
		if kept[i] {
			k = "1"
		}
		fmt.Fprintf(b, "%d,%s,%.9g,%s,%s\n", i, file, score[i], c, k)
	}
	return b.Flush()
}

func csvField(s string) string {
	if strings.ContainsAny(s, ",\"\r\n") {
		return `"` + strings.ReplaceAll(s, `"`, `""`) + `"`
	}
	return s
}

func (r *curateReport) print(out io.Writer) error {
	fmt.Fprintf(out, "%d examples of %d features, ranked by %s; %s ones kept\n\n", r.Examples, r.Features, r.Method, r.Mode)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	const most = 30
	if len(r.Groups) > 0 {
		fmt.Fprintf(w, "%s\texamples\tkept\tshare\tmean score\t\n", r.Grouping)
		for _, g := range r.Groups[:min(most, len(r.Groups))] {
			fmt.Fprintf(w, "%s\t%d\t%d\t%.0f %%\t%.4g\t\n", g.Name, g.Examples, g.Kept, 100*float64(g.Kept)/float64(g.Examples), g.Score)
		}
		if n := len(r.Groups) - most; n > 0 {
			fmt.Fprintf(w, "and %d more\t\t\t\t\t\n", n)
		}
	}
	fmt.Fprintf(w, "all\t%d\t%d\t%.0f %%\t\t\n", r.Examples, r.Kept, 100*float64(r.Kept)/float64(r.Examples))
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nscore (high = hard): least %.4g, median %.4g, greatest %.4g, border of what is kept %.4g\n", r.Score.Min, r.Score.Median, r.Score.Max, r.Score.Border)
	if r.Output != "" {
		fmt.Fprintf(out, "written to %s\n", r.Output)
		return nil
	}
	_, err := fmt.Fprintln(out, "nothing was written; -o ranked.csv writes the ranking")
	return err
}

func newCurateTheoryCommand(a *app) *cobra.Command {
	var alpha, keep, angle float64
	cmd := &cobra.Command{
		Use:   "theory",
		Short: "What the exact theory of data pruning expects of a perceptron",
		Long: `The typical test error of a max-margin perceptron that learns from pruned data, by the exact theory of
arXiv:2206.14486. A pool has --alpha examples per input; the share --keep of it stays, by a probe at --angle
degrees to the truth. It shows when to keep hard examples and when to keep easy ones.`,
		Example: `  lathe curate theory --alpha 20 --keep 0.2
  lathe curate theory --alpha 1 --keep 0.5 --angle 20`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 0 {
				return usageErrorf("curate theory takes no arguments, and got %q", args)
			}
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			type row struct {
				Selection string                 `json:"selection"`
				Alpha     float64                `json:"alpha"` // examples per input trained on
				Point     curate.PerceptronPoint `json:"point"`
			}
			var rows []row
			var problems error
			add := func(name string, alpha, keep float64, m curate.Mode) {
				p, err := curate.PerceptronTheory(alpha, keep, angle*math.Pi/180, m)
				problems = errors.Join(problems, err)
				rows = append(rows, row{name, alpha, p})
			}
			add("hard", alpha*keep, keep, curate.Hard)
			if problems != nil {
				return usageErrorf("%v", problems)
			}
			add("random", alpha*keep, 1, curate.Hard)
			add("easy", alpha*keep, keep, curate.Easy)
			add("all", alpha, 1, curate.Hard)
			if problems != nil {
				return problems
			}
			return a.emit(rows, func(out io.Writer) error {
				w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
				fmt.Fprint(w, "kept\texamples per input\ttest error\toverlap\tmargin\t\n")
				for _, r := range rows {
					fmt.Fprintf(w, "%s\t%.4g\t%.4g %%\t%.4f\t%.4g\t\n", r.Selection, r.Alpha, 100*r.Point.Error, r.Point.R, r.Point.Kappa)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().Float64Var(&alpha, "alpha", 4, "examples per input in the pool, before pruning")
	cmd.Flags().Float64Var(&keep, "keep", 0.5, "share of the pool that is kept")
	cmd.Flags().Float64Var(&angle, "angle", 0, "angle between the probe and the truth in degrees, 0 to below 90")
	return cmd
}
