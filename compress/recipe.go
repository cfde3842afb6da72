package compress

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/nn"
)

// Recipe says how a network is compressed: one method or several, each on its sites, in one pass. It is written beside
// every compressed network, and running it again on the same model and examples gives the same bytes.
type Recipe struct {
	Seed       uint64 `yaml:"seed" json:"seed"`                                               // of everything that is drawn
	Cases      int    `yaml:"calibration_cases,omitempty" json:"calibration_cases,omitempty"` // 0: what the first step's method wants; -1: all
	Preprocess string `yaml:"preprocess,omitempty" json:"preprocess,omitempty"`               // how pictures become inputs; "": as the model says
	Opset      int    `yaml:"opset,omitempty" json:"opset,omitempty"`                         // of the ONNX file; 0: by the bits
	Steps      []Part `yaml:"steps" json:"steps"`
}

// Part is one step of a recipe.
type Part struct {
	Method  string            `yaml:"method" json:"method"`
	Bits    int               `yaml:"bits" json:"bits"`                       // of a weight
	ActBits int               `yaml:"abits,omitempty" json:"abits,omitempty"` // of an activation, 32: float; 0: as Bits
	Include []string          `yaml:"include,omitempty" json:"include,omitempty"`
	Exclude []string          `yaml:"exclude,omitempty" json:"exclude,omitempty"`
	Sites   map[string]Bits   `yaml:"sites,omitempty" json:"sites,omitempty"` // bits of single sites
	Set     map[string]string `yaml:"set,omitempty" json:"set,omitempty"`     // the method's own knobs

	lines map[string]int // of the keys, in the file it was read from
}

// MaxRecipe is the greatest size of a recipe file in bytes.
const MaxRecipe = 1 << 20

// ParseRecipe reads YAML. What names the file in errors, which give line and key. Unknown keys, keys that are given twice,
// aliases and more than one document are refused.
func ParseRecipe(what string, b []byte) (*Recipe, error) {
	if len(b) > MaxRecipe {
		return nil, fmt.Errorf("%s: %d bytes; a recipe has at most %d", what, len(b), MaxRecipe)
	}
	var root yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(&root); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s: it is empty; a recipe has the key steps, a list of {method, bits}", what)
		}
		return nil, fmt.Errorf("%s: %w", what, recipeError(err))
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: it holds more than one document", what)
	}
	if n := findAlias(&root); n != nil {
		return nil, fmt.Errorf("%s: line %d: aliases are not read; write the value out", what, n.Line)
	}
	strict := yaml.NewDecoder(bytes.NewReader(b))
	strict.KnownFields(true)
	r := &Recipe{}
	if err := strict.Decode(r); err != nil {
		return nil, fmt.Errorf("%s: %w", what, recipeError(err))
	}
	if len(r.Steps) == 0 {
		return nil, fmt.Errorf("%s: it has no steps; write a list of {method, bits} under the key steps", what)
	}
	if steps := child(root.Content[0], "steps"); steps != nil {
		for i, n := range steps.Content {
			if i < len(r.Steps) {
				r.Steps[i].lines = keyLines("", n)
			}
		}
	}
	for i := range r.Steps {
		if err := r.Steps[i].check(); err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
	}
	if r.Cases < -1 {
		return nil, fmt.Errorf("%s: calibration_cases: %d; give a positive number, or -1 for all", what, r.Cases)
	}
	return r, nil
}

// Errorf makes an error that names the line of a key of the step, when it was read from a file, and the key itself.
func (s *Part) Errorf(key, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if key != "" {
		text = key + ": " + text
	}
	if line := s.lines[key]; line > 0 {
		return fmt.Errorf("line %d: %s", line, text)
	}
	if line := s.lines[""]; line > 0 {
		return fmt.Errorf("line %d: %s", line, text)
	}
	return errors.New(text)
}

func (s *Part) check() error {
	if s.Method == "" {
		return s.Errorf("method", "a step names its method")
	}
	for name, b := range s.Sites {
		if b.Weight < 0 || b.Act < 0 {
			return s.Errorf("sites."+name, "bits %d and %d; they are positive, or left out", b.Weight, b.Act)
		}
	}
	for _, list := range []struct {
		key      string
		patterns []string
	}{{"include", s.Include}, {"exclude", s.Exclude}} {
		for _, p := range list.patterns {
			if _, err := compilePattern(p); err != nil {
				return s.Errorf(list.key, "%v", err)
			}
		}
	}
	return nil
}

// Marshal writes the recipe as YAML behind some lines of comment. Equal recipes give equal bytes.
func (r *Recipe) Marshal(comments ...string) ([]byte, error) {
	var b bytes.Buffer
	for _, c := range comments {
		for _, line := range strings.Split(c, "\n") {
			fmt.Fprintf(&b, "# %s\n", line)
		}
	}
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(r); err != nil {
		return nil, fmt.Errorf("compress: recipe: %w", err)
	}
	if err := e.Close(); err != nil {
		return nil, fmt.Errorf("compress: recipe: %w", err)
	}
	return b.Bytes(), nil
}

// unknownField is how the YAML decoder names a key that a type lacks.
var unknownField = regexp.MustCompile(`field (\S+) not found in type compress\.(\w+)`)

// recipeError puts the decoder's messages into the recipe's words.
func recipeError(err error) error {
	keys := map[string][]string{
		"Recipe": {"seed", "calibration_cases", "preprocess", "opset", "steps"},
		"Part":   {"method", "bits", "abits", "include", "exclude", "sites", "set"},
		"Bits":   {"weight", "activation"},
	}
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	text = strings.Join(strings.Fields(strings.TrimPrefix(text, "unmarshal errors:")), " ")
	text = unknownField.ReplaceAllStringFunc(text, func(m string) string {
		f := unknownField.FindStringSubmatch(m)
		s := fmt.Sprintf("there is no key %q; accepted: %s", f[1], strings.Join(keys[f[2]], ", "))
		if near, ok := nearest.Match(f[1], keys[f[2]]); ok {
			s = fmt.Sprintf("there is no key %q; did you mean %q?", f[1], near)
		}
		return s
	})
	return errors.New(text)
}

func findAlias(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode || n.Anchor != "" {
		return n
	}
	for _, c := range n.Content {
		if a := findAlias(c); a != nil {
			return a
		}
	}
	return nil
}

// child is the value of a mapping's key, or nil.
func child(n *yaml.Node, key string) *yaml.Node {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// keyLines are the lines of a mapping's keys, of those within it as "set.key", and of itself as "".
func keyLines(prefix string, n *yaml.Node) map[string]int {
	lines := map[string]int{strings.TrimSuffix(prefix, "."): n.Line}
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		key := prefix + n.Content[i].Value
		if n.Content[i+1].Kind == yaml.MappingNode {
			maps.Copy(lines, keyLines(key+".", n.Content[i+1]))
		}
		lines[key] = n.Content[i].Line
	}
	return lines
}

// compilePattern makes a pattern of --include, --exclude and recipes a test of names: a name that is exactly the pattern
// always fits, and any other in which it is found as a regular expression. kindPrefix begins a pattern of another sort.
func compilePattern(p string) (*regexp.Regexp, error) {
	if p == "" {
		return nil, errors.New("an empty pattern; name a site, or give a regular expression")
	}
	re, err := regexp.Compile(p)
	if err != nil {
		return nil, fmt.Errorf("%q is no regular expression (%w); write regexp characters of a name with a backslash", p, err)
	}
	return re, nil
}

// targets are the nodes that patterns are about: sites, and products, whose operands methods quantise too.
func targets(net *nn.Network) (nodes []*nn.Node) {
	for _, n := range net.Nodes {
		switch n.Op.(type) {
		case nn.Linear, nn.MatMul:
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// kindPrefix begins a pattern that selects by what a site is, as "lathe inspect" says it.
const kindPrefix = "kind:"

// matches returns the names that a pattern selects: the one that it is, all of a kind, or all in which it is found.
func matches(pattern string, nodes []*nn.Node) ([]string, error) {
	if kind, ok := strings.CutPrefix(pattern, kindPrefix); ok {
		return ofKind(kind, nodes)
	}
	re, err := compilePattern(pattern)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range nodes {
		if n.Name == pattern {
			return []string{n.Name}, nil
		}
		names = append(names, n.Name)
	}
	found := slices.DeleteFunc(slices.Clone(names), func(s string) bool { return !re.MatchString(s) })
	if len(found) == 0 {
		if near, ok := nearest.Match(pattern, names); ok {
			return nil, fmt.Errorf("no site is named or matches %q; did you mean %q?", pattern, near)
		}
		return nil, fmt.Errorf("no site is named or matches %q; \"lathe inspect\" lists them", pattern)
	}
	return found, nil
}

func ofKind(kind string, nodes []*nn.Node) (names []string, err error) {
	var kinds []string
	for _, n := range nodes {
		kinds = append(kinds, n.Op.Kind())
		if n.Op.Kind() == kind {
			names = append(names, n.Name)
		}
	}
	if names == nil {
		slices.Sort(kinds)
		return nil, fmt.Errorf("no site is of kind %q; here are %s", kind, strings.Join(slices.Compact(kinds), ", "))
	}
	return names, nil
}

// Assign gives each step its sites and products of a network, by name: what its patterns select; a step without include
// takes what no other step's include selects. A site of two steps is an error, and so is a pattern that selects nothing.
func (r *Recipe) Assign(net *nn.Network) ([]map[string]bool, error) {
	nodes := targets(net)
	out := make([]map[string]bool, len(r.Steps))
	owner := map[string]int{}
	claim := func(i int, names []string) error {
		for _, name := range names {
			if k, ok := owner[name]; ok && k != i {
				return r.Steps[i].Errorf("", "step %d (%s) and step %d (%s) both take %q; let one of them exclude it", k+1, r.Steps[k].Method, i+1, r.Steps[i].Method, name)
			}
			owner[name] = i
			out[i][name] = true
		}
		return nil
	}
	excluded := make([]map[string]bool, len(r.Steps))
	for i := range r.Steps {
		s := &r.Steps[i]
		out[i], excluded[i] = map[string]bool{}, map[string]bool{}
		for _, p := range s.Exclude {
			names, err := matches(p, nodes)
			if err != nil {
				return nil, s.Errorf("exclude", "%v", err)
			}
			for _, name := range names {
				excluded[i][name] = true
			}
		}
		for _, p := range s.Include {
			names, err := matches(p, nodes)
			if err != nil {
				return nil, s.Errorf("include", "%v", err)
			}
			if err := claim(i, slices.DeleteFunc(names, func(n string) bool { return excluded[i][n] })); err != nil {
				return nil, err
			}
		}
	}
	claimed := maps.Clone(owner)
	for i := range r.Steps {
		s := &r.Steps[i]
		if len(s.Include) == 0 {
			var names []string
			for _, n := range nodes {
				if _, ok := claimed[n.Name]; !ok && !excluded[i][n.Name] {
					names = append(names, n.Name)
				}
			}
			if err := claim(i, names); err != nil {
				return nil, err
			}
		}
		if len(out[i]) == 0 {
			return nil, s.Errorf("", "step %d (%s) has no site", i+1, s.Method)
		}
		for _, name := range slices.Sorted(maps.Keys(s.Sites)) {
			if !out[i][name] {
				return nil, s.Errorf("sites."+name, "step %d (%s) does not take a site of that name", i+1, s.Method)
			}
		}
	}
	return out, nil
}
