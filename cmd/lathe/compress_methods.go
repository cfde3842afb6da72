package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/nearest"
)

// compressor is a row of the table of methods: what compress needs to know of one.
type compressor struct {
	name  string
	about string // one line
	cases int    // calibration cases when nobody says; -1: all there are; 0: it needs none

	bits       [2]int // least and most bits of a weight; zero: 2 to 8
	weightOnly bool   // activations stay in float, whatever --abits says

	// For --dry-run and --max-memory: passes of the float network over the calibration cases that a run is worth (a
	// gradient step counts three; zero: not known), and whether a site's inputs are held for all cases at once.
	passes float64
	atOnce bool

	search bool   // the search for a budget tries it: a run takes seconds
	knobs  []knob // what --set and a recipe's set accept
	make   func(s *methodSettings) compress.Method
}

// methodSettings are what a row's constructor makes a method of.
type methodSettings struct {
	compress.Options
	bits  compress.Bits // 32: float
	batch int           // cases per pass; 0: the method's own

	classes []int // of the calibration cases, for a step that learns from them; nil: not known

	values map[string]string // of every knob of the row, checked
}

func (s *methodSettings) text(key string) string {
	v, ok := s.values[key]
	if !ok {
		panic(fmt.Errorf("the method has no knob %q", key))
	}
	return v
}

func (s *methodSettings) on(key string) bool { return s.text(key) == "true" }

func (s *methodSettings) whole(key string) int {
	n, err := strconv.Atoi(s.text(key))
	if err != nil {
		panic(err)
	}
	return n
}

func (s *methodSettings) number(key string) float64 {
	v, err := strconv.ParseFloat(s.text(key), 64)
	if err != nil {
		panic(err)
	}
	return v
}

// knob is a setting of one method.
type knob struct {
	key, about string
	def        string
	accepted   string                   // in words
	check      func(v string) (ok bool) // of a value
}

// choice is a knob of some words, the first of which is the default.
func choice(key, about string, accepted ...string) knob {
	return knob{key: key, about: about, def: accepted[0], accepted: strings.Join(accepted, ", "), check: func(v string) bool { return slices.Contains(accepted, v) }}
}

// whole is a knob of whole numbers from lo to hi.
func whole(key, about string, def, lo, hi int) knob {
	return knob{key: key, about: about, def: strconv.Itoa(def), accepted: fmt.Sprintf("%d to %d", lo, hi), check: func(v string) bool {
		n, err := strconv.Atoi(v)
		return err == nil && n >= lo && n <= hi
	}}
}

// number is a knob of numbers from lo to hi.
func number(key, about string, def, lo, hi float64) knob {
	return knob{key: key, about: about, def: strconv.FormatFloat(def, 'g', -1, 64), accepted: fmt.Sprintf("%g to %g", lo, hi), check: func(v string) bool {
		x, err := strconv.ParseFloat(v, 64)
		return err == nil && !math.IsNaN(x) && x >= lo && x <= hi
	}}
}

// toggle is a knob that is true or false.
func toggle(key, about string, def bool) knob {
	return knob{key: key, about: about, def: strconv.FormatBool(def), accepted: "true, false", check: func(v string) bool {
		return v == "true" || v == "false"
	}}
}

// findCompressor returns the row of a method.
func findCompressor(name string) (*compressor, error) {
	for i := range compressors {
		if compressors[i].name == name {
			return &compressors[i], nil
		}
	}
	names := compressorNames()
	if near, ok := nearest.Match(name, names); ok {
		return nil, fmt.Errorf("there is no method %q to compress with; did you mean %q?", name, near)
	}
	return nil, fmt.Errorf("there is no method %q to compress with; accepted: %s", name, strings.Join(names, ", "))
}

func compressorNames() (names []string) {
	for _, c := range compressors {
		names = append(names, c.name)
	}
	return names
}

// aboutCompressors lists the methods with their knobs for the help.
func aboutCompressors() string {
	var b strings.Builder
	width := len(slices.MaxFunc(compressors, func(a, b compressor) int { return len(a.name) - len(b.name) }).name)
	for _, c := range compressors {
		fmt.Fprintf(&b, "  %-*s  %s\n", width, c.name, c.about)
		for _, k := range c.knobs {
			fmt.Fprintf(&b, "  %-*s    --set %s=   %s: %s (default: %s)\n", width, "", k.key, k.about, k.accepted, k.def)
		}
	}
	return b.String()
}

// weightBits are the least and most bits of a weight.
func (c *compressor) weightBits() (lo, hi int) {
	if c.bits == [2]int{} {
		return 2, 8
	}
	return c.bits[0], c.bits[1]
}

// settle fills a step in with what holds where it says nothing, so that the recipe that is written says all, and checks
// it. Errors name the step's key.
func (c *compressor) settle(s *compress.Part) error {
	lo, hi := c.weightBits()
	if s.Bits == 0 {
		s.Bits = min(8, hi)
	}
	if s.Bits < lo || s.Bits > hi {
		return s.Errorf("bits", "%d; accepted: %d to %d, by %s", s.Bits, lo, hi, c.name)
	}
	switch {
	case c.weightOnly && s.ActBits != 0 && s.ActBits != 32:
		return s.Errorf("abits", "%d; %s leaves activations in float", s.ActBits, c.name)
	case c.weightOnly:
		s.ActBits = 32
	case s.ActBits == 0:
		s.ActBits = max(s.Bits, 2)
	}
	if s.ActBits != 32 && (s.ActBits < 2 || s.ActBits > 8) {
		return s.Errorf("abits", "%d; accepted: 2 to 8, or 32 for float", s.ActBits)
	}
	for _, site := range slices.Sorted(maps.Keys(s.Sites)) {
		b := s.Sites[site]
		if b.Weight != 0 && (b.Weight < lo || b.Weight > hi) {
			return s.Errorf("sites."+site, "weight bits %d; accepted: %d to %d, by %s", b.Weight, lo, hi, c.name)
		}
		if b.Act != 0 && b.Act != 32 && (b.Act < 2 || b.Act > 8 || c.weightOnly) {
			return s.Errorf("sites."+site, "activation bits %d; accepted: 2 to 8, or 32 for float", b.Act)
		}
	}
	var keys []string
	for _, k := range c.knobs {
		keys = append(keys, k.key)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Set)) {
		i := slices.Index(keys, key)
		if i < 0 {
			if near, ok := nearest.Match(key, keys); ok {
				return s.Errorf("set."+key, "%s has no such setting; did you mean %q?", c.name, near)
			}
			if len(keys) == 0 {
				return s.Errorf("set."+key, "%s has no settings", c.name)
			}
			return s.Errorf("set."+key, "%s has no such setting; accepted: %s", c.name, strings.Join(keys, ", "))
		}
		if k := c.knobs[i]; !k.check(s.Set[key]) {
			return s.Errorf("set."+key, "%q; accepted: %s", s.Set[key], k.accepted)
		}
	}
	return nil
}

// classesKnob is the knob of methods that train with the classes of their examples, where they are known.
const classesKnob = "labels"

// learnsClasses says whether a step does.
func (c *compressor) learnsClasses(s compress.Part) bool {
	i := slices.IndexFunc(c.knobs, func(k knob) bool { return k.key == classesKnob })
	return i >= 0 && cmp.Or(s.Set[classesKnob], c.knobs[i].def) == "true"
}

// method makes the method of a step that settle has accepted. classes are those of the calibration cases; nil: not known.
func (c *compressor) method(s compress.Part, o compress.Options, batch int, classes []int) compress.Method {
	m := &methodSettings{Options: o, bits: compress.Bits{Weight: s.Bits, Act: s.ActBits}, batch: batch, values: map[string]string{}}
	if c.learnsClasses(s) {
		m.classes = classes
	}
	for _, k := range c.knobs {
		m.values[k.key] = k.def
	}
	maps.Copy(m.values, s.Set)
	m.Bits = s.Sites
	return c.make(m)
}

// parseSet reads values of --set, key=value.
func parseSet(list []string) (map[string]string, error) {
	var set map[string]string
	for _, s := range list {
		key, value, ok := strings.Cut(s, "=")
		if key = strings.TrimSpace(key); !ok || key == "" {
			return nil, usageErrorf("--set %q; write key=value", s)
		}
		if _, twice := set[key]; twice {
			return nil, usageErrorf("--set names %s twice", key)
		}
		if set == nil {
			set = map[string]string{}
		}
		set[key] = strings.TrimSpace(value)
	}
	return set, nil
}
