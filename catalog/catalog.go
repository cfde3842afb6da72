// Package catalog has one card per method: where it comes from, what it does, when to use it and how to call it. The
// cards are Markdown files with a head of "key: value" lines, embedded in the program.
package catalog

import (
	"embed"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/lathe-ml/lathe/internal/nearest"
)

//go:embed cards
var files embed.FS

// Card describes one method.
type Card struct {
	ID      string `json:"id"`              // "soft-nms": how the commands name it
	Number  int    `json:"number"`          // of the method in Lathe's list; 0 for a plain baseline that is not in it
	Name    string `json:"name"`            // "Soft-NMS"
	Paper   string `json:"paper"`           // title
	Authors string `json:"authors"`         //
	Venue   string `json:"venue"`           // "ICCV 2017"
	ArXiv   string `json:"arxiv,omitempty"` // "1704.04503"
	Family  string `json:"family"`          // "detection"
	Go      string `json:"go"`              // package and type: "task/detect.SoftNMS"
	Use     string `json:"use"`             // one line: what it is good for, or the command that applies it
	Body    string `json:"body"`            // Markdown
}

// URL is where the paper can be read, or "".
func (c Card) URL() string {
	if c.ArXiv == "" {
		return ""
	}
	return "https://arxiv.org/abs/" + c.ArXiv
}

var load = sync.OnceValues(func() ([]Card, error) { return parseDir(files, "cards") })

// All returns all cards in order of their number. The slice is the caller's.
func All() ([]Card, error) {
	cards, err := load()
	return slices.Clone(cards), err
}

// Find returns the card of a method. When there is none, the error names the one that was probably meant.
func Find(id string) (Card, error) {
	cards, err := load()
	if err != nil {
		return Card{}, err
	}
	ids := make([]string, len(cards))
	for i, c := range cards {
		if ids[i] = c.ID; c.ID == id {
			return c, nil
		}
	}
	for _, c := range cards { // "5", "05" and "Soft-NMS" name it too
		if n, err := strconv.Atoi(id); err == nil && n > 0 && n == c.Number || strings.EqualFold(c.Name, id) {
			return c, nil
		}
	}
	return Card{}, &UnknownError{ID: id, Near: near(id, cards, ids)}
}

// UnknownError says that there is no method of that id.
type UnknownError struct {
	ID   string
	Near string // the id that was probably meant, or ""
}

func (e *UnknownError) Error() string {
	if e.Near != "" {
		return fmt.Sprintf("there is no method %q; did you mean %q?", e.ID, e.Near)
	}
	return fmt.Sprintf("there is no method %q; \"lathe methods\" lists them", e.ID)
}

func near(id string, cards []Card, ids []string) string {
	if n, ok := nearest.Match(id, ids); ok {
		return n
	}
	names := make([]string, len(cards))
	for i, c := range cards {
		names[i] = c.Name
	}
	if n, ok := nearest.Match(id, names); ok {
		return cards[slices.Index(names, n)].ID
	}
	return ""
}

// parseDir reads all cards of a folder.
func parseDir(fsys fs.FS, dir string) ([]Card, error) {
	entries, err := fs.ReadDir(fsys, dir)
	if err != nil {
		return nil, fmt.Errorf("catalog: %w", err)
	}
	var cards []Card
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".md")
		if !ok || e.IsDir() {
			continue
		}
		b, err := fs.ReadFile(fsys, path.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("catalog: %w", err)
		}
		c, err := Parse(string(b))
		if err != nil {
			return nil, fmt.Errorf("catalog: card %s: %w", e.Name(), err)
		}
		if c.ID != id {
			return nil, fmt.Errorf("catalog: card %s: its id is %q; it must be the file's name", e.Name(), c.ID)
		}
		for _, other := range cards {
			if other.Number == c.Number && c.Number > 0 {
				return nil, fmt.Errorf("catalog: cards %s and %s both have the number %d", other.ID, c.ID, c.Number)
			}
		}
		cards = append(cards, c)
	}
	slices.SortStableFunc(cards, func(a, b Card) int { return a.Number - b.Number })
	return cards, nil
}

// Parse reads one card: a head of "key: value" lines between two lines "---", then Markdown. The keys are id, number,
// name, paper, authors, venue, family, go and use, which must be there, and arxiv.
func Parse(text string) (Card, error) {
	var c Card
	text = strings.ReplaceAll(text, "\r\n", "\n")
	rest, ok := strings.CutPrefix(text, "---\n")
	if !ok {
		return c, fmt.Errorf("must begin with a line \"---\"")
	}
	head, body, ok := strings.Cut(rest, "\n---\n")
	if !ok {
		return c, fmt.Errorf("the head has no closing line \"---\"")
	}
	c.Body = strings.TrimSpace(body)
	fields := []struct {
		key      string
		value    *string
		optional bool
	}{
		{"id", &c.ID, false},
		{"number", new(string), false},
		{"name", &c.Name, false},
		{"paper", &c.Paper, false},
		{"authors", &c.Authors, false},
		{"venue", &c.Venue, false},
		{"arxiv", &c.ArXiv, true},
		{"family", &c.Family, false},
		{"go", &c.Go, false},
		{"use", &c.Use, false},
	}
	seen := map[string]bool{}
	for i, line := range strings.Split(head, "\n") {
		if strings.TrimSpace(line) == "" {
			continue
		}
		key, value, ok := strings.Cut(line, ":")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok {
			return c, fmt.Errorf("line %d: %q is no \"key: value\"", i+2, line)
		}
		if seen[key] {
			return c, fmt.Errorf("line %d: key %q is given twice", i+2, key)
		}
		seen[key] = true
		if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
			value = value[1 : len(value)-1]
		}
		found := false
		for _, f := range fields {
			if f.key == key {
				*f.value, found = value, true
			}
		}
		if !found {
			return c, fmt.Errorf("line %d: unknown key %q", i+2, key)
		}
	}
	for _, f := range fields {
		if *f.value == "" && !f.optional {
			return c, fmt.Errorf("key %q is missing", f.key)
		}
		if f.key == "number" {
			n, err := strconv.Atoi(*f.value)
			if err != nil || n < 0 {
				return c, fmt.Errorf("number %q is no whole number", *f.value)
			}
			c.Number = n
		}
	}
	for _, r := range c.ID {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return c, fmt.Errorf("id %q: only lower-case letters, digits and '-'", c.ID)
		}
	}
	if c.Body == "" {
		return c, fmt.Errorf("has no text under its head")
	}
	return c, nil
}
