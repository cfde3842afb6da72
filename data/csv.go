package data

import (
	"bufio"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Table is a matrix of numbers read from CSV.
type Table struct {
	Header     []string // names of the columns, if the first line had any
	Rows, Cols int
	Data       []float64 // [Rows, Cols], row-major
}

// Row returns row i; it is shared.
func (t *Table) Row(i int) []float64 { return t.Data[i*t.Cols : (i+1)*t.Cols] }

// maxCSVLine bounds one line of a CSV file.
const maxCSVLine = 16 << 20

// ReadCSV reads numbers separated by commas, semicolons or tabs (told by the first line), the same number on every
// line. A first line with anything that is not a number is a header. Empty lines are skipped; NaN and infinities are
// accepted as Go writes them. Memory is bounded by eight bytes per field, so by four times the file.
func ReadCSV(r io.Reader) (*Table, error) {
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 0, 1<<16), maxCSVLine)
	t := &Table{}
	sep := ","
	line := 0
	for in.Scan() {
		line++
		text := strings.TrimSuffix(in.Text(), "\r")
		if line == 1 {
			text = strings.TrimPrefix(text, "\ufeff")
		}
		if strings.TrimSpace(text) == "" {
			continue
		}
		first := t.Cols == 0
		if first {
			for _, s := range []string{",", "\t", ";"} {
				if strings.Contains(text, s) {
					sep = s
					break
				}
			}
			t.Cols = strings.Count(text, sep) + 1
			if _, bad := parseRow(nil, text, sep); bad >= 0 {
				for f := range strings.SplitSeq(text, sep) {
					t.Header = append(t.Header, strings.Trim(strings.TrimSpace(f), `"`))
				}
				continue
			}
		}
		if n := strings.Count(text, sep) + 1; n != t.Cols {
			return nil, badf("csv", fmt.Sprintf("line %d", line), "has %d fields, and the first line has %d", n, t.Cols)
		}
		var bad int
		if t.Data, bad = parseRow(t.Data, text, sep); bad >= 0 {
			field := strings.Split(text, sep)[bad]
			return nil, badf("csv", fmt.Sprintf("line %d, field %d", line, bad+1), "%s is not a number", quote(field))
		}
		t.Rows++
	}
	if err := in.Err(); errors.Is(err, bufio.ErrTooLong) {
		return nil, badf("csv", fmt.Sprintf("line %d", line+1), "%w: longer than %d bytes", ErrTooLarge, maxCSVLine)
	} else if err != nil {
		return nil, badf("csv", fmt.Sprintf("line %d", line+1), "%w", err)
	}
	if t.Rows == 0 {
		return nil, badf("csv", "", "no numbers")
	}
	return t, nil
}

// parseRow appends the numbers of a line to dst; bad is the first field that is none, or -1.
func parseRow(dst []float64, line, sep string) (_ []float64, bad int) {
	i := 0
	for f := range strings.SplitSeq(line, sep) {
		v, err := strconv.ParseFloat(strings.TrimSpace(f), 64)
		if err != nil && !errors.Is(err, strconv.ErrRange) {
			return dst, i
		}
		dst = append(dst, v)
		i++
	}
	return dst, -1
}

// quote shortens text from outside for an error message.
func quote(s string) string {
	const most = 40
	if len(s) > most {
		cut := most
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		return strconv.Quote(s[:cut]) + "..."
	}
	return strconv.Quote(s)
}

// Label names the class of one file.
type Label struct{ File, Class string }

// ReadLabels reads a CSV of file names and labels, `file,label` with or without that line as header; further columns
// are ignored. Labels may be class names or numbers. A file that is named twice with different labels is an error.
func ReadLabels(r io.Reader) ([]Label, error) {
	in := csv.NewReader(bufio.NewReader(&lineLimit{r: r}))
	in.FieldsPerRecord = -1
	in.ReuseRecord = true
	in.TrimLeadingSpace = true
	var out []Label
	seen := map[string]string{}
	for first := true; ; first = false {
		rec, err := in.Read()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, badf("csv", "labels", "%w", err)
		}
		line, _ := in.FieldPos(0)
		if len(rec) < 2 {
			return nil, badf("csv", fmt.Sprintf("line %d", line), "has one field; want file,label")
		}
		file, class := strings.TrimPrefix(rec[0], "\ufeff"), strings.TrimSpace(rec[1])
		if first && strings.EqualFold(file, "file") && (strings.EqualFold(class, "label") || strings.EqualFold(class, "class")) {
			continue
		}
		if file == "" || class == "" {
			return nil, badf("csv", fmt.Sprintf("line %d", line), "file %s has the label %s; neither may be empty", quote(file), quote(class))
		}
		file, class = strings.Clone(file), strings.Clone(class)
		if old, ok := seen[file]; ok {
			if old != class {
				return nil, badf("csv", fmt.Sprintf("line %d", line), "file %s is labelled %s here and %s before", quote(file), quote(class), quote(old))
			}
			continue
		}
		seen[file] = class
		out = append(out, Label{file, class})
	}
	if len(out) == 0 {
		return nil, badf("csv", "labels", "no labels")
	}
	return out, nil
}

// ReadLabelsFile reads a CSV file of labels.
func ReadLabelsFile(path string) ([]Label, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	l, err := ReadLabels(f)
	return l, inFile(path, err)
}

// ReadCSVFile reads a CSV file of numbers.
func ReadCSVFile(path string) (*Table, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := ReadCSV(f)
	return t, inFile(path, err)
}

// lineLimit fails on a line longer than maxCSVLine, before encoding/csv gathers it.
type lineLimit struct {
	r io.Reader
	n int
}

func (l *lineLimit) Read(p []byte) (int, error) {
	k, err := l.r.Read(p)
	for _, b := range p[:k] {
		if l.n++; b == '\n' {
			l.n = 0
		}
		if l.n > maxCSVLine {
			return 0, fmt.Errorf("%w: a line is longer than %d bytes", ErrTooLarge, maxCSVLine)
		}
	}
	return k, err
}
