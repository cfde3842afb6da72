package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gomlx/compute"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

type compressFlags struct {
	method, granularity, softmax string
	bits, abits                  int
	include, exclude, set        []string
	recipe                       string

	calib, eval, labels, data string
	calibLabels               string
	calibCases, evalCases     int
	preprocess                string
	shapes                    []string
	tokens                    int

	size, latency        string
	maxDrop, accuracy    float64
	points               int
	report, output       string
	opset, batch         int
	seed                 uint64
	blame                string
	dryRun, verbose      bool
	maxMemory            string
	saveInputs, saveOuts string
}

func newCompressCommand(a *app) *cobra.Command {
	var f compressFlags
	cmd := &cobra.Command{
		Use:   "compress MODEL --method NAME --bits N --calib DIR|FILE -o OUT.onnx|OUT.safetensors",
		Short: "Make a trained network smaller: weights and activations of few bits",
		Long: `Quantise a trained network from some unlabelled examples: ONNX, safetensors that lathe wrote, or the folder of a published
BERT encoder or EfficientNet-Lite0. Write it as ONNX with QuantizeLinear and DequantizeLinear, which ONNX Runtime and
others load, or as safetensors, which "lathe eval" and Go programs read back. With it come a report (size, bits and error
of every site, agreement with the original and accuracy with their 95 % intervals, the sites that hurt most) and the
recipe that was used, which gives the same file again.

Three ways to say what is wanted:

  --method NAME --bits N     one method; --include and --exclude choose its sites, --set key=value its settings
  --recipe FILE.yaml         several methods in one pass, each on its sites
  --size 25% --max-drop 0.5  a budget: methods and bits of each site are searched, the frontier is printed, and the
                             point that meets the budget is written

Methods:
` + aboutCompressors() + `
Sites are the layers with weights; "lathe inspect MODEL" lists them. A pattern of --include or --exclude is a site's name
a regular expression that is found in it, or kind:KIND for all sites of a kind (kind:dense). What is left out stays in float.

The examples are a folder of pictures, an .npy file of inputs as the network takes them (for several inputs one file
each, separated by commas), or a .txt file of one text a line for an encoder with a tokenizer.json. Pictures are read as
ImageNet classifiers read them, unless --preprocess or the model's own metadata ("preprocess") say otherwise. With --eval
the networks are compared on other examples than those of the calibration; --labels is a CSV of file,label (for .npy:
number of the case,label) or an .npy of classes. --data takes both from a data set that lathe knows.

A method that trains (ofq) learns from classes too, where they are known: --data has them, --calib-labels gives those of
--calib beside an --eval of its own. With --labels and no --eval, a fifth of the examples is held out: the method trains on the
others, and accuracy is that of the fifth, which it has not seen. Without classes, or with --set labels=false, it learns from
the float network alone.

A run that is stopped goes on where it was: the same command finds the finished sites in the cache and computes nothing
twice. --dry-run prints size, memory and time of a run, as estimates, before any work: what is alive at once in its
heaviest phase, and what the process grows to. Garbage is collected in time to stay below --max-memory, or else below four
fifths of what is available; a run that would need more than --max-memory is refused.

The search measures how much each site alone costs at each number of bits, finds the best allocations of bits for a
ladder of sizes (exactly, taking the losses as additive), and runs the methods that serve the network on them.
--size and --latency are upper limits, as shares of the original or, for --size, as bytes; --max-drop is in percentage
points of accuracy when there are labels, else of agreement with the original (for outputs that are embeddings: of
cosine times 100). Latency is a model, not a measurement: ` + compress.LatencyModel + `.

` + preprocessHelp + `

ONNX Runtime by default fuses the quantised operators into integer kernels of its own, which on processors without
VNNI saturate; what lathe reports is what ORT_ENABLE_BASIC computes.`,
		Example: `  lathe compress vit.onnx --method repq-vit --bits 4 --calib images/ -o vit4.onnx
  lathe compress vit.onnx --method repq-vit --bits 6 --calib calib.npy --eval test.npy --labels labels.npy -o vit6.onnx
  lathe compress vit.safetensors --method minmax --bits 8 --calib images/ --exclude head -o vit8.safetensors
  lathe compress pages.onnx --method minmax --bits 8 --calib scans/ --preprocess "resize=256" --labels labels.csv -o pages8.onnx
  lathe compress vit.onnx --method minmax --bits 4 --abits 32 --calib images/ --dry-run
  lathe compress vit.onnx --recipe vit4.recipe.yaml --calib images/ -o again.onnx
  lathe compress vit.onnx --size 25% --max-drop 0.5 --calib images/ --labels labels.csv -o small.onnx`,
		Args: exactArgs("a model"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newCompression(a, args[0], f, func(name string) bool { return cmd.Flags().Changed(name) })
			if err != nil {
				return err
			}
			return c.run(cmd.Context())
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.method, "method", "", "how: "+strings.Join(compressorNames(), ", ")+"; in a search: which of them, separated by commas")
	fl.IntVar(&f.bits, "bits", 8, "bits of a weight, usually 2 to 8")
	fl.IntVar(&f.abits, "abits", 0, "bits of an activation, 2 to 8, or 32 for float (default: as --bits; in a search 8)")
	fl.StringArrayVar(&f.include, "include", nil, "only sites of this name or kind:KIND, or that match this regular expression; may be repeated")
	fl.StringArrayVar(&f.exclude, "exclude", nil, "leave such sites in float; may be repeated")
	fl.StringArrayVar(&f.set, "set", nil, "a setting of the method, key=value, see above; may be repeated")
	fl.StringVar(&f.recipe, "recipe", "", "YAML file that says method, bits and sites, instead of the flags above")
	fl.StringVar(&f.granularity, "granularity", "", "the same as --set granularity=")
	fl.StringVar(&f.softmax, "softmax", "", "the same as --set softmax=")

	fl.StringVar(&f.calib, "calib", "", "examples to calibrate on: a folder of pictures, .npy, or .txt")
	fl.IntVar(&f.calibCases, "calib-cases", 0, "how many of them, drawn by --seed; -1: all (default: what the method wants, 32 to 256)")
	fl.StringVar(&f.eval, "eval", "", "examples to judge on (default: those of --calib)")
	fl.IntVar(&f.evalCases, "eval-cases", -1, "how many of them, drawn by --seed; -1: all")
	fl.StringVar(&f.labels, "labels", "", "classes of the examples that are judged: CSV of file,label, or .npy")
	fl.StringVar(&f.calibLabels, "calib-labels", "", "with --eval: classes of the examples of --calib, for a method that learns from them")
	fl.StringVar(&f.data, "data", "", "data set to calibrate on (training part) and to judge on (test part): "+strings.Join(labelledSets(), ", "))
	fl.StringVar(&f.preprocess, "preprocess", "", "how pictures become inputs, see above")
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of an input that the model leaves open, name=1,3,48,320; may be repeated")
	fl.IntVar(&f.tokens, "tokens", 0, "length of a BERT encoder's inputs (default: 128)")
	fl.Uint64Var(&f.seed, "seed", 0, "seed of all that is drawn")

	fl.StringVar(&f.size, "size", "", "search: at most this size of the parameters, 25% or 1.5MB")
	fl.StringVar(&f.latency, "latency", "", "search: at most this share of the original's time by the model above, such as 25%")
	fl.Float64Var(&f.maxDrop, "max-drop", 0, "search: quality may fall by so many percentage points")
	fl.Float64Var(&f.accuracy, "accuracy", 0, "search: quality must be at least this, in per cent")
	fl.IntVar(&f.points, "points", 8, "search: allocations of bits that every method is run on")

	fl.BoolVar(&f.dryRun, "dry-run", false, "print size, memory and time as estimates, and write nothing")
	fl.StringVar(&f.maxMemory, "max-memory", "", "most memory of a run, such as 2GB: smaller batches are taken, or the run is refused before it starts")
	fl.IntVar(&f.batch, "batch", 0, "cases per pass (default: 64, or less where inputs are large)")
	fl.StringVar(&f.blame, "blame", "auto", "what each site alone costs the output: on, off, or auto, which is on when it takes seconds")
	fl.IntVar(&f.opset, "opset", 0, "operator set of the file, 17 to 21 (default: 21 up to 4 bits, for 4-bit containers; else 17)")
	fl.StringVar(&f.report, "report", "", `HTML report to write (default: beside the output, ending in .report.html; "none": no report)`)
	fl.StringVarP(&f.output, "output", "o", "", "file to write: .onnx, or .safetensors, which lathe reads back (a byte per weight)")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "a line for each site, on a terminal too")
	fl.StringVar(&f.saveInputs, "save-inputs", "", "write the judged inputs to this .npy file, to check the output elsewhere (further inputs: .1.npy, .2.npy, ...)")
	fl.StringVar(&f.saveOuts, "save-outputs", "", "write the compressed network's outputs on them to this .npy file")
	_ = cmd.RegisterFlagCompletionFunc("method", oneOf(compressorNames()...))
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	_ = cmd.RegisterFlagCompletionFunc("blame", oneOf("auto", "on", "off"))
	return cmd
}

// compression is one call of lathe compress.
type compression struct {
	*app
	compressFlags
	model  string
	from   *compress.Recipe // what to do, from the flags or a file; nil: it is searched
	target *searchTarget    // nil: no search
	memory int64            // limit in bytes; 0: none

	started time.Time
}

// newCompression checks the flags before anything is read; given says which of them the command line has.
func newCompression(a *app, model string, f compressFlags, given func(flag string) bool) (*compression, error) {
	c := &compression{app: a, compressFlags: f, model: model, started: time.Now()}
	searching := given("size") || given("latency") || given("max-drop") || given("accuracy")
	switch {
	case f.recipe != "":
		for _, flag := range []string{"method", "bits", "abits", "include", "exclude", "set", "granularity", "softmax", "size", "latency", "max-drop", "accuracy"} {
			if given(flag) {
				return nil, usageErrorf("--recipe and --%s exclude each other; write it into the recipe", flag)
			}
		}
	case f.method == "" && !searching:
		return nil, usageErrorf("name a method with --method: %s; or a --recipe, or a budget such as --size 25%%", strings.Join(compressorNames(), ", "))
	}
	switch {
	case f.calib != "" && f.data != "":
		return nil, usageErrorf("give --calib or --data, not both")
	case f.data != "" && !slices.Contains(labelledSets(), f.data):
		return nil, chooseOne("data", f.data, labelledSets())
	case f.labels != "" && f.data != "" && f.eval == "":
		return nil, usageErrorf("--data %s has its own classes; leave --labels out", f.data)
	case f.calibLabels != "" && (f.calib == "" || f.eval == ""):
		return nil, usageErrorf("--calib-labels are the classes of --calib beside an --eval of its own; without that --labels gives them")
	case f.calibCases < -1 || f.evalCases < -1 || f.evalCases == 0:
		return nil, usageErrorf("--calib-cases %d, --eval-cases %d; give a positive number, or -1 for all", f.calibCases, f.evalCases)
	case f.batch < 0:
		return nil, usageErrorf("--batch %d; it must be positive", f.batch)
	case f.output == "" && !f.dryRun:
		return nil, usageErrorf("name the file to write with -o")
	case f.output != "" && !isNetworkFile(f.output):
		return nil, usageErrorf("-o %s; quantised networks are written as .onnx or .safetensors", f.output)
	case f.opset != 0 && (f.opset < 17 || f.opset > 21):
		return nil, usageErrorf("--opset %d; accepted: 17 to 21", f.opset)
	case f.output != "" && sameFile(f.output, model):
		return nil, usageErrorf("-o %s would overwrite the model; name another file", f.output)
	case !slices.Contains([]string{"auto", "on", "off"}, f.blame):
		return nil, usageErrorf("--blame %s; accepted: auto, on, off", f.blame)
	}
	if c.report == "" && f.output != "" {
		c.report = strings.TrimSuffix(f.output, filepath.Ext(f.output)) + ".report.html"
	}
	if _, err := parsePreprocessing(f.preprocess); err != nil {
		return nil, err
	}
	var err error
	if f.maxMemory != "" {
		if c.memory, err = parseBytes(f.maxMemory); err != nil {
			return nil, usageErrorf("--max-memory %s: %v", f.maxMemory, err)
		}
	}
	if searching {
		c.target, err = newSearchTarget(f, given)
		if err == nil && len(c.target.needsExamples()) > 0 && f.calib == "" && f.data == "" {
			err = usageErrorf("name examples with --calib: a folder of pictures, .npy, or .txt")
		}
		if err != nil {
			return nil, err
		}
		return c, c.checkClasses()
	}
	if c.from, err = f.readRecipe(); err != nil {
		return nil, err
	}
	if err := c.checkClasses(); err != nil {
		return nil, err
	}
	if f.calib == "" && f.data == "" {
		for _, s := range c.from.Steps {
			if m, err := findCompressor(s.Method); err == nil && m.cases != 0 {
				return nil, usageErrorf("name examples with --calib: a folder of pictures, .npy, or .txt; %s calibrates on them", s.Method)
			}
		}
	}
	return c, nil
}

// checkClasses refuses classes that nobody would look at.
func (c *compression) checkClasses() error {
	if c.calibLabels != "" && !c.learnsClasses() {
		return usageErrorf("--calib-labels: nothing here learns from classes; leave it out")
	}
	return nil
}

// learnsClasses says whether a step, or a method of a search, trains with the classes of its examples, where they are known.
func (c *compression) learnsClasses() bool {
	if c.target != nil {
		set, err := parseSet(c.set)
		return err == nil && slices.ContainsFunc(c.target.methods, func(m *compressor) bool { return m.learnsClasses(compress.Part{Set: set}) })
	}
	return slices.ContainsFunc(c.from.Steps, func(s compress.Part) bool {
		m, err := findCompressor(s.Method)
		return err == nil && m.learnsClasses(s)
	})
}

// readRecipe makes the recipe of the flags, or reads the file, and settles what it leaves open.
func (f compressFlags) readRecipe() (*compress.Recipe, error) {
	var r *compress.Recipe
	wrap := func(err error) error { // a key of the recipe is a flag here
		key, rest, _ := strings.Cut(err.Error(), ": ")
		set, isSet := strings.CutPrefix(key, "set.")
		switch {
		case isSet:
			return usageErrorf("--set %s: %s", set, rest)
		case slices.Contains([]string{"bits", "abits", "include", "exclude"}, key):
			return usageErrorf("--%s %s", key, rest)
		case key == "method":
			return usageErrorf("%s", rest)
		}
		return usageErrorf("%v", err)
	}
	if f.recipe != "" {
		b, err := readAtMost(f.recipe, compress.MaxRecipe)
		if err != nil {
			return nil, err
		}
		if r, err = compress.ParseRecipe(f.recipe, b); err != nil {
			return nil, usageErrorf("%v", err)
		}
		wrap = func(err error) error { return usageErrorf("%s: %v", f.recipe, err) }
	} else {
		set, err := parseSet(f.set)
		if err != nil {
			return nil, err
		}
		for key, v := range map[string]string{"granularity": f.granularity, "softmax": f.softmax} {
			if v == "" {
				continue
			}
			if set == nil {
				set = map[string]string{}
			}
			set[key] = v
		}
		r = &compress.Recipe{Seed: f.seed, Steps: []compress.Part{{Method: f.method, Bits: f.bits, ActBits: f.abits, Include: f.include, Exclude: f.exclude, Set: set}}}
	}
	// What the command line says wins.
	r.Seed = cmp.Or(f.seed, r.Seed)
	r.Cases = cmp.Or(f.calibCases, r.Cases)
	r.Preprocess = cmp.Or(f.preprocess, r.Preprocess)
	r.Opset = cmp.Or(f.opset, r.Opset)
	if err := settleRecipe(r); err != nil {
		return nil, wrap(err)
	}
	if _, err := parsePreprocessing(r.Preprocess); err != nil {
		return nil, err
	}
	if r.Opset != 0 && (r.Opset < 17 || r.Opset > 21) {
		return nil, usageErrorf("%s: opset: %d; accepted: 17 to 21", f.recipe, r.Opset)
	}
	return r, nil
}

// settleRecipe checks a recipe's steps and fills in what follows from the methods.
func settleRecipe(r *compress.Recipe) error {
	least := 32
	for i := range r.Steps {
		s := &r.Steps[i]
		m, err := findCompressor(s.Method)
		if err != nil {
			return s.Errorf("method", "%v", err)
		}
		if err := m.settle(s); err != nil {
			return err
		}
		least = min(least, s.Bits)
		for _, b := range s.Sites {
			if b.Weight > 0 {
				least = min(least, b.Weight)
			}
		}
		if r.Cases == 0 {
			r.Cases = m.cases
		}
	}
	if r.Opset == 0 {
		if r.Opset = 17; least <= 4 {
			r.Opset = 21
		}
	}
	return nil
}

// readAtMost reads a file that may have so many bytes.
func readAtMost(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s: more than %d bytes", path, most)
	}
	return b, err
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// compressResult is what lathe compress --json prints.
type compressResult struct {
	Model            string               `json:"model"`
	Method           string               `json:"method"`
	WeightBits       int                  `json:"weight_bits"`
	ActBits          int                  `json:"activation_bits"`
	Granularity      string               `json:"granularity,omitempty"`
	Output           string               `json:"output"`
	Report           string               `json:"report,omitempty"`
	RecipeFile       string               `json:"recipe_file"`
	Recipe           *compress.Recipe     `json:"recipe"`
	Backend          string               `json:"backend"`
	Calibration      string               `json:"calibration"`
	CalibrationCases int                  `json:"calibration_cases"`
	Evaluation       string               `json:"evaluation"`
	Size             compressSize         `json:"size"`
	Agreement        compress.Agreement   `json:"agreement"`
	Bars             compress.Bars        `json:"agreement_95"`
	Embedding        bool                 `json:"embedding,omitempty"` // outputs are directions, not classes: the cosine counts
	Accuracy         *compress.Accuracies `json:"accuracy,omitempty"`
	Blame            []compress.Blame     `json:"blame,omitempty"`
	BlameCases       int                  `json:"blame_cases,omitempty"`
	Sites            []compress.Site      `json:"sites"`
	Notes            []string             `json:"notes,omitempty"`
	Search           *searchResult        `json:"search,omitempty"`
	Seconds          float64              `json:"seconds"` // of the compression itself
}

// compressSize is in bytes.
type compressSize struct {
	FloatParameters int64 `json:"float_parameters"`
	Parameters      int64 `json:"parameters"` // packed codes, scales and zero points included
	InputFile       int64 `json:"input_file"`
	OutputFile      int64 `json:"output_file"`
}

// material is what a compression works on.
type material struct {
	net      *nn.Network
	backend  compute.Backend
	calib    *cases
	examples compress.Examples // drawn of calib; nil: the method needs none
	judged   *cases
	labels   []int // of the judged cases; nil: none
	classes  []int // of the examples, if a step learns from them; nil: not known, or none does
	batch    int
	key      string // hash of the model, the examples and what the results depend on beside the recipe
}

func (c *compression) run(ctx context.Context) error {
	c.limitMemory()
	m, err := c.prepare(ctx)
	if err != nil {
		return err
	}
	if c.target != nil && !c.dryRun {
		return c.search(ctx, m)
	}
	plans := []*compress.Recipe{c.from}
	if c.target != nil {
		if plans, err = c.target.recipes(c.compressFlags, m.net); err != nil {
			return err
		}
	}
	if c.dryRun || c.memory > 0 {
		p, err := c.plan(ctx, m, plans)
		if err != nil {
			return err
		}
		if c.dryRun {
			return c.emit(p, p.write)
		}
	}
	journal, err := c.openJournal(m, c.from)
	if err != nil {
		return err
	}
	r := &compressResult{}
	if err := closeJournal(journal, c.compress(ctx, m, c.from, journal, r)); err != nil {
		return err
	}
	return c.print(r)
}

// prepare reads the model and opens the examples.
func (c *compression) prepare(ctx context.Context) (*material, error) {
	m := &material{}
	var err error
	if m.net, err = c.readModel(); err != nil {
		return nil, err
	}
	preprocess, seed, count := c.preprocess, c.seed, c.calibCases
	if c.from != nil {
		preprocess, seed, count = c.from.Preprocess, c.from.Seed, c.from.Cases
	} else if count == 0 {
		count = c.target.calibrationCases()
	}
	source := exampleSource{model: c.model, inputs: c.calib, data: c.data, train: true, preprocess: preprocess}
	switch {
	case c.calib != "" || c.data != "":
		if m.calib, err = source.open(ctx, m.net); err != nil {
			return nil, err
		}
	default:
		if m.calib, err = openRandom(m.net, 64, seed); err != nil {
			return nil, err
		}
	}
	switch {
	case c.eval != "":
		source.inputs = c.eval
		m.judged, err = source.open(ctx, m.net)
	case c.data != "":
		source.train = false
		m.judged, err = source.open(ctx, m.net)
	default:
		m.judged = m.calib
	}
	if err != nil {
		return nil, err
	}
	if c.data != "" {
		m.calib.source += ", training part"
		if c.eval == "" {
			m.judged.source += ", test part"
		}
	}
	if m.labels = m.judged.classes; c.labels != "" {
		if m.labels, err = m.judged.labels(c.labels); err != nil {
			return nil, err
		}
	}
	classes := m.calib.classes
	if c.calibLabels != "" {
		if classes, err = m.calib.labels(c.calibLabels); err != nil {
			return nil, err
		}
	}
	if c.learnsClasses() && m.judged == m.calib && m.labels != nil {
		if classes, err = m.holdOut(seed); err != nil {
			return nil, err
		}
	}
	if c.evalCases > 0 && c.evalCases < m.judged.n {
		m.judged, m.labels = m.judged.some(drawCases(m.judged.n, c.evalCases, seed), m.labels)
	}
	if m.backend, err = c.backend(); err != nil {
		return nil, err
	}
	m.batch = c.chooseBatch(m.net)
	if c.calib != "" || c.data != "" {
		drawn := drawCases(m.calib.n, count, seed)
		if m.examples, err = m.calib.load(drawn); err != nil {
			return nil, err
		}
		if c.learnsClasses() && classes != nil {
			for _, i := range drawn {
				m.classes = append(m.classes, classes[i])
			}
		}
	}
	m.key, err = c.materialKey(m)
	return m, err
}

// heldOut is the share of labelled examples that is judged on when the classes of the others are learnt.
const heldOut = 5 // one of so many

// holdOut takes the examples apart: those that are judged, and those that are learnt from with their classes, which it
// returns.
func (m *material) holdOut(seed uint64) (classes []int, err error) {
	all, labels := m.calib, m.labels
	if all.n < 2 {
		return nil, fmt.Errorf("%s: one case with its class is too few to learn from some and judge on others; give more, or --set %s=false", all.source, classesKnob)
	}
	held := drawCases(all.n, max(1, all.n/heldOut), seed)
	rest := slices.DeleteFunc(data.Range(all.n), func(i int) bool { _, ok := slices.BinarySearch(held, i); return ok })
	m.judged, m.labels = all.some(held, labels)
	m.calib, classes = all.some(rest, labels)
	m.judged.source += ", held out of the training"
	m.calib.source += ", less those held out"
	return classes, nil
}

// some are the cases of the given indices, with their labels.
func (c *cases) some(idx []int, labels []int) (*cases, []int) {
	s := &cases{source: c.source, n: len(idx), held: c.held, load: func(k []int) (compress.Examples, error) {
		at := make([]int, len(k))
		for i := range k {
			at[i] = idx[k[i]]
		}
		return c.load(at)
	}}
	if labels == nil {
		return s, nil
	}
	chosen := make([]int, len(idx))
	for i := range idx {
		chosen[i] = labels[idx[i]]
	}
	return s, chosen
}

// readModel reads the network by what the path names.
func (c *compression) readModel() (*nn.Network, error) {
	if _, err := os.Stat(c.model); err != nil {
		return nil, err
	}
	dims, err := parseShapes(c.shapes)
	if err != nil {
		return nil, err
	}
	return readAnyNetwork(c.model, dims, c.tokens)
}

// chooseBatch keeps the inputs of one pass below 64 MB.
func (c *compression) chooseBatch(net *nn.Network) int {
	if c.batch > 0 {
		return c.batch
	}
	row := int64(1)
	for _, in := range net.Inputs {
		row += in.Shape.ByteSize() / int64(max(in.Shape.Dimensions[0], 1))
	}
	return int(max(1, min(compress.DefaultBatch, 64_000_000/8/row)))
}

// drawCases draws k of n cases without repetition, in ascending order; k < 0 or k >= n takes all.
func drawCases(n, k int, seed uint64) []int {
	idx := data.Range(n)
	if k >= 0 && k < n {
		idx = rng.New(seed, "calibration").Perm(n)[:k]
		slices.Sort(idx)
	}
	return idx
}

// compress runs a recipe, judges what comes out, and writes network, recipe and report.
func (c *compression) compress(ctx context.Context, m *material, recipe *compress.Recipe, journal *compress.Journal, r *compressResult) error {
	start := time.Now()
	res, err := c.apply(ctx, m, recipe, journal)
	if err != nil {
		return fmt.Errorf("%s: %w", c.model, err)
	}
	first := recipe.Steps[0]
	r.Model, r.Method, r.WeightBits, r.ActBits, r.Recipe = c.model, first.Method, first.Bits, first.ActBits, recipe
	for _, s := range recipe.Steps[1:] {
		r.Method += " and " + s.Method
	}
	r.Granularity = cmp.Or(first.Set["granularity"], "channel")
	r.Output, r.Backend, r.Calibration, r.CalibrationCases, r.Evaluation = c.output, m.backend.Name(), m.calib.source, m.examples.Len(), m.judged.source
	r.Sites, r.Notes, r.Seconds = res.Sites, append(r.Notes, res.Notes...), time.Since(start).Seconds()
	r.Size.FloatParameters, r.Size.Parameters = compress.Size(m.net), compress.Size(res.Network)
	per, err := c.judge(ctx, m, res.Network, r)
	if err != nil {
		return err
	}
	if err := c.blameSites(ctx, m, res, per, journal, r); err != nil {
		return err
	}
	if res.Network.Meta == nil {
		res.Network.Meta = map[string]string{}
	}
	res.Network.Meta[compressKey] = summary(recipe)
	if recipe.Preprocess != "" {
		res.Network.Meta[preprocessKey] = recipe.Preprocess
	}
	if err := writeNetwork(c.output, res.Network, recipe.Opset); err != nil {
		return err
	}
	for path, size := range map[string]*int64{c.model: &r.Size.InputFile, c.output: &r.Size.OutputFile} {
		info, err := os.Stat(path)
		if err == nil && info.IsDir() {
			info, err = os.Stat(filepath.Join(path, "model.safetensors"))
		}
		if err != nil {
			return err
		}
		*size = info.Size()
	}
	r.RecipeFile = strings.TrimSuffix(c.output, filepath.Ext(c.output)) + ".recipe.yaml"
	if sameFile(r.RecipeFile, c.recipe) {
		r.RecipeFile = c.recipe // it says the same
	} else if err := c.writeRecipe(r.RecipeFile, recipe, m, r); err != nil {
		return err
	}
	if c.report != "none" {
		r.Report = c.report
		return r.document(c.args).Save(c.report)
	}
	return nil
}

// summary is the line that a compressed network carries in its metadata.
func summary(r *compress.Recipe) string {
	var parts []string
	for _, s := range r.Steps {
		act := fmt.Sprintf("A%d", s.ActBits)
		if s.ActBits == 32 {
			act = ""
		}
		mixed := ""
		if len(s.Sites) > 0 {
			mixed = " mixed"
		}
		parts = append(parts, fmt.Sprintf("%s W%d%s%s", s.Method, s.Bits, act, mixed))
	}
	return strings.Join(parts, ", ")
}

// writeRecipe writes the recipe that was used. What the comments name is not needed to run it again but for its examples.
func (c *compression) writeRecipe(path string, recipe *compress.Recipe, m *material, r *compressResult) error {
	examples := ""
	switch {
	case c.calib != "" && m.classes != nil && c.eval == "":
		examples = " --calib " + c.calib + " --labels " + c.labels
	case c.calib != "" && m.classes != nil:
		examples = " --calib " + c.calib + " --calib-labels " + c.calibLabels + " --eval " + c.eval
	case c.calib != "":
		examples = " --calib " + c.calib
	case c.data != "":
		examples = " --data " + c.data
	}
	b, err := recipe.Marshal(
		"lathe compress "+c.model+" --recipe "+filepath.Base(path)+examples+" -o "+filepath.Base(c.output),
		fmt.Sprintf("gave %s: %s of %s", filepath.Base(c.output), report.Bytes(r.Size.Parameters), report.Bytes(r.Size.FloatParameters)),
		fmt.Sprintf("calibrated on %d cases of %s", r.CalibrationCases, m.calib.source),
	)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, func(w io.Writer) error { _, err := w.Write(b); return err })
}

// print prints the result.
func (c *compression) print(r *compressResult) error {
	d := r.document(c.args)
	return c.emit(r, func(w io.Writer) error {
		if err := d.WriteText(w, c.width()); err != nil {
			return err
		}
		where := ""
		if r.Report != "" {
			where = ", report in " + r.Report
		}
		_, err := fmt.Fprintf(w, "\nwrote %s (%s), recipe in %s%s\n", c.output, report.Bytes(r.Size.OutputFile), r.RecipeFile, where)
		return err
	})
}
