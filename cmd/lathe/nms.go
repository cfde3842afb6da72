package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/task/detect"
)

type nmsFlags struct {
	method                                        string
	sigma, iouThreshold, scoreThreshold, preScore float64
	topK                                          int
	plusOne, perCategory                          bool
	truth, output                                 string
}

func newNMSCommand(a *app) *cobra.Command {
	var f nmsFlags
	cmd := &cobra.Command{
		Use:   "nms DETECTIONS.json",
		Short: "Suppress a detector's overlapping boxes: Soft-NMS or greedy NMS on COCO files",
		Long: `Rescore a detector's raw boxes so that boxes which overlap a better one fall behind (Soft-NMS, arXiv:1704.04503),
or remove them (--method hard). The input is a COCO results file, a list of {image_id, category_id, bbox: [x, y,
width, height], score}, taken before any other suppression; - reads standard input. Every category of every image
is treated by itself. The output has the same form, best first in each image; ids and other fields stay as they are.

With --gt, a COCO file of labelled objects, COCO's average precision and recall are printed for the boxes as they
came, for greedy NMS at the same threshold, and for the method chosen.

Scores come out lower: choose the score from which you accept a detection anew, and do not cut raw boxes by a high
score before, or there is nothing left to gain.`,
		Example: `  lathe nms raw.json -o detections.json
  lathe nms raw.json --gt instances.json
  lathe nms raw.json --method linear --iou-threshold 0.4 --gt instances.json -o detections.json
  lathe nms raw.json --method hard --iou-threshold 0.5 -o - | jq length`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErrorf("nms needs one file of detections, and got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return runNMS(a, args[0], f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.method, "method", "gaussian", "how overlapping boxes are treated: "+strings.Join(detect.Methods, ", "))
	fl.Float64Var(&f.sigma, "sigma", 0.5, "width of the Gaussian weight exp(-IoU²/sigma), above 0; smaller suppresses more")
	fl.Float64Var(&f.iouThreshold, "iou-threshold", 0.3, "overlap beyond which linear and hard act, 0 to 1")
	fl.Float64Var(&f.scoreThreshold, "score-threshold", 0.001, "boxes whose new score is below this are dropped")
	fl.Float64Var(&f.preScore, "pre-threshold", 0, "boxes whose old score is not above this are left out from the start")
	fl.IntVar(&f.topK, "top-k", 100, "boxes kept per image, all categories together")
	fl.BoolVar(&f.plusOne, "plus-one", false, "measure boxes as inclusive pixel indices, as the paper's code does")
	fl.BoolVar(&f.perCategory, "per-category", false, "print AP of each category too (with --gt)")
	fl.StringVar(&f.truth, "gt", "", "COCO file of labelled objects to measure AP against")
	fl.StringVarP(&f.output, "output", "o", "", "write the detections here; - for standard output; without it only the summary is printed")
	_ = cmd.RegisterFlagCompletionFunc("method", cobra.FixedCompletions(detect.Methods, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// config checks the flags, which say 0 where they mean 0.
func (f nmsFlags) config() (detect.SoftNMSConfig, error) {
	m, err := detect.ParseMethod(f.method)
	if err != nil {
		return detect.SoftNMSConfig{}, usageErrorf("--method %q; accepted: %s", f.method, strings.Join(detect.Methods, ", "))
	}
	switch {
	case !(f.sigma > 0):
		return detect.SoftNMSConfig{}, usageErrorf("--sigma %g; it must be above 0 (0.4 to 0.7 are usual)", f.sigma)
	case !(f.iouThreshold >= 0 && f.iouThreshold <= 1):
		return detect.SoftNMSConfig{}, usageErrorf("--iou-threshold %g; it lies between 0 and 1", f.iouThreshold)
	case !(f.scoreThreshold >= 0):
		return detect.SoftNMSConfig{}, usageErrorf("--score-threshold %g; it must not be negative", f.scoreThreshold)
	case !(f.preScore >= 0):
		return detect.SoftNMSConfig{}, usageErrorf("--pre-threshold %g; it must not be negative", f.preScore)
	case f.topK < 1:
		return detect.SoftNMSConfig{}, usageErrorf("--top-k %d; it must be at least 1", f.topK)
	case f.perCategory && f.truth == "":
		return detect.SoftNMSConfig{}, usageErrorf("--per-category needs --gt")
	}
	zero := func(v float64) float64 {
		if v == 0 {
			return detect.Zero
		}
		return v
	}
	return detect.SoftNMSConfig{
		Method: m, Sigma: f.sigma, IoUThreshold: zero(f.iouThreshold), ScoreThreshold: zero(f.scoreThreshold),
		PreThreshold: zero(f.preScore), TopK: f.topK, PlusOne: f.plusOne,
	}, nil
}

// nmsReport is what nms prints as JSON.
type nmsReport struct {
	Input          string  `json:"input"`
	Method         string  `json:"method"`
	Sigma          float64 `json:"sigma,omitempty"`
	IoUThreshold   float64 `json:"iou_threshold"`
	ScoreThreshold float64 `json:"score_threshold"`
	TopK           int     `json:"top_k"`
	PlusOne        bool    `json:"plus_one"`
	Images         int     `json:"images"`
	Categories     int     `json:"categories"`
	Detections     int     `json:"detections"`
	Kept           int     `json:"kept"`
	Output         string  `json:"output,omitempty"`

	// With ground truth: the boxes as they came, greedy NMS, and the method.
	Truth       string             `json:"gt,omitempty"`
	Before      *detect.COCOResult `json:"before,omitempty"`
	Greedy      *detect.COCOResult `json:"greedy,omitempty"`
	After       *detect.COCOResult `json:"after,omitempty"`
	PerCategory []nmsCategory      `json:"per_category,omitempty"`
}

type nmsCategory struct {
	ID     int     `json:"id"`
	Name   string  `json:"name"`
	Before float64 `json:"AP_before"` // -1: the category has no objects
	Greedy float64 `json:"AP_greedy"`
	After  float64 `json:"AP_after"`
}

func runNMS(a *app, input string, f nmsFlags) error {
	cfg, err := f.config()
	if err != nil {
		return err
	}
	if a.json && f.output == "-" {
		return usageErrorf("--json and -o - both write to standard output; name a file")
	}
	var dets []detect.COCODetection
	if input == "-" {
		if dets, err = detect.ReadCOCODetections(a.stdin); err != nil {
			return fmt.Errorf("standard input: %w", err)
		}
	} else if dets, err = detect.ReadCOCODetectionsFile(input); err != nil {
		return err
	}
	kept, err := detect.SuppressCOCO(dets, cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", input, err)
	}
	r := nmsReport{
		Input: input, Method: f.method, IoUThreshold: f.iouThreshold, ScoreThreshold: f.scoreThreshold,
		TopK: f.topK, PlusOne: f.plusOne, Detections: len(dets), Kept: len(kept), Output: f.output, Truth: f.truth,
	}
	if cfg.Method == detect.Gaussian {
		r.Sigma = f.sigma
	}
	images, categories := map[int]bool{}, map[int]bool{}
	for _, d := range dets {
		images[d.ImageID], categories[d.CategoryID] = true, true
	}
	r.Images, r.Categories = len(images), len(categories)
	if f.truth != "" {
		if err := r.evaluate(f.truth, dets, kept, cfg); err != nil {
			return err
		}
	}
	write := func(w io.Writer) error { return detect.WriteCOCODetections(w, kept) }
	switch f.output {
	case "":
	case "-":
		if r.After != nil {
			if err := r.print(a.stderr, f.perCategory); err != nil {
				return err
			}
		}
		return write(a.stdout)
	default:
		if err := atomicfile.Write(f.output, write); err != nil {
			return err
		}
	}
	return a.emit(r, func(w io.Writer) error { return r.print(w, f.perCategory) })
}

// evaluate measures the detections as they came, after greedy NMS and after the method.
func (r *nmsReport) evaluate(path string, dets, kept []detect.COCODetection, cfg detect.SoftNMSConfig) error {
	truth, err := detect.ReadCOCOFile(path)
	if err != nil {
		return err
	}
	measure := func(dets []detect.COCODetection) (*detect.COCOResult, error) {
		gt, dt, c, err := truth.Match(dets)
		if err != nil {
			return nil, fmt.Errorf("%s against %s: %w", r.Input, path, err)
		}
		return detect.EvaluateCOCO(gt, dt, c)
	}
	if r.Before, err = measure(dets); err != nil {
		return err
	}
	if r.After, err = measure(kept); err != nil {
		return err
	}
	r.Greedy = r.After
	if cfg.Method != detect.Hard {
		cfg.Method = detect.Hard
		greedy, err := detect.SuppressCOCO(dets, cfg)
		if err != nil {
			return err
		}
		if r.Greedy, err = measure(greedy); err != nil {
			return err
		}
	}
	for i, c := range truth.Categories {
		r.PerCategory = append(r.PerCategory, nmsCategory{c.ID, c.Name, r.Before.PerClass[i], r.Greedy.PerClass[i], r.After.PerClass[i]})
	}
	return nil
}

func (r *nmsReport) print(out io.Writer, perCategory bool) error {
	fmt.Fprintf(out, "%d detections in %d images and %d categories\n", r.Detections, r.Images, r.Categories)
	how := r.Method
	switch r.Method {
	case "gaussian":
		how += fmt.Sprintf(", sigma %g", r.Sigma)
	case "linear", "hard":
		how += fmt.Sprintf(", beyond an overlap of %g", r.IoUThreshold)
	}
	fmt.Fprintf(out, "%s: %d kept", how, r.Kept)
	if r.Output != "" && r.Output != "-" {
		fmt.Fprintf(out, ", in %s", r.Output)
	}
	fmt.Fprintln(out)
	if r.After == nil {
		return nil
	}
	fmt.Fprintln(out)
	points := func(v float64) string {
		if v < 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f", 100*v)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	row := func(name string, before, greedy, after float64) {
		if r.Method == "hard" {
			fmt.Fprintf(w, "%s\t%s\t%s\t\n", name, points(before), points(after))
			return
		}
		gain := "-"
		if after >= 0 && greedy >= 0 {
			gain = fmt.Sprintf("%+.1f", 100*(after-greedy))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t\n", name, points(before), points(greedy), points(after), gain)
	}
	head := func(what string) {
		if r.Method == "hard" {
			fmt.Fprintf(w, "%s\tas it came\tNMS %g\t\n", what, r.IoUThreshold)
			return
		}
		fmt.Fprintf(w, "%s\tas it came\tNMS %g\t%s\tover NMS\t\n", what, r.IoUThreshold, r.Method)
	}
	b, g, n := r.Before, r.Greedy, r.After
	head("points")
	row("AP", b.AP, g.AP, n.AP)
	row("AP50", b.AP50, g.AP50, n.AP50)
	row("AP75", b.AP75, g.AP75, n.AP75)
	row("AP small", b.APSmall, g.APSmall, n.APSmall)
	row("AP medium", b.APMedium, g.APMedium, n.APMedium)
	row("AP large", b.APLarge, g.APLarge, n.APLarge)
	for i, k := range b.MaxDets {
		row(fmt.Sprint("AR", k), b.AR[i], g.AR[i], n.AR[i])
	}
	row("AR small", b.ARSmall, g.ARSmall, n.ARSmall)
	row("AR medium", b.ARMedium, g.ARMedium, n.ARMedium)
	row("AR large", b.ARLarge, g.ARLarge, n.ARLarge)
	if perCategory {
		fmt.Fprintln(w, "\t\t\t\t\t")
		head("AP by category")
		for _, c := range r.PerCategory {
			name := c.Name
			if name == "" {
				name = fmt.Sprint(c.ID)
			}
			row(name, c.Before, c.Greedy, c.After)
		}
	}
	return w.Flush()
}
