package report

import (
	"io"
	"regexp"
	"strings"

	"github.com/charmbracelet/lipgloss"
)

// WriteTable prints one table for a terminal that is width columns wide.
func WriteTable(w io.Writer, s Table, width int) error {
	t := newTextWriter(w, width)
	if s.Title != "" {
		t.println(t.r.NewStyle().Bold(true).Render(s.Title))
		s.Title = ""
	}
	t.table(s.Columns, s.Rows, func(int, int) lipgloss.Style { return t.r.NewStyle() })
	t.note(s.Note)
	_, err := w.Write(t.buf.Bytes())
	return err
}

var (
	listItem = regexp.MustCompile(`^(\s*)([-*]|\d+\.)\s+(.*)$`)
	link     = regexp.MustCompile(`\[([^\]]+)\]\(([^)]+)\)`)
	strong   = regexp.MustCompile(`\*\*([^*]+)\*\*`)
	code     = regexp.MustCompile("`([^`]+)`")
)

// Markdown lays plain Markdown (headings, paragraphs, lists, code blocks, tables, bold, code, links) out for a terminal
// that w may be.
func Markdown(w io.Writer, text string, width int) string {
	t := newTextWriter(w, width)
	var para []string
	prefix, hang := "", ""
	flush := func() {
		if len(para) > 0 {
			body := t.wrapTo(t.inline(strings.Join(para, " ")), width-len([]rune(hang)))
			t.println(prefix + strings.ReplaceAll(body, "\n", "\n"+hang))
		}
		para, prefix, hang = nil, "", ""
	}
	var rows [][]string
	flushTable := func() {
		if len(rows) > 0 {
			t.table(rows[0], rows[1:], nil)
			rows = nil
		}
	}
	fenced := false
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		trimmed := strings.TrimSpace(line)
		if !strings.HasPrefix(trimmed, "|") || fenced {
			flushTable()
		}
		switch {
		case strings.HasPrefix(trimmed, "```"):
			flush()
			fenced = !fenced
		case fenced:
			t.println("    " + line)
		case trimmed == "":
			flush()
			t.println()
		case strings.HasPrefix(trimmed, "#"):
			flush()
			t.println(t.r.NewStyle().Bold(true).Render(strings.TrimSpace(strings.TrimLeft(trimmed, "#"))))
		case strings.HasPrefix(trimmed, "|"):
			flush()
			cells := strings.Split(strings.Trim(trimmed, "|"), "|")
			for i := range cells {
				cells[i] = strings.TrimSpace(cells[i])
			}
			if strings.Trim(strings.Join(cells, ""), "-: ") != "" {
				rows = append(rows, cells)
			}
		default:
			if m := listItem.FindStringSubmatch(line); m != nil {
				flush()
				prefix = m[1] + m[2] + " "
				hang = strings.Repeat(" ", len(prefix))
				trimmed = m[3]
			}
			para = append(para, trimmed)
		}
	}
	flush()
	flushTable()
	return t.buf.String()
}

// inline renders what stands inside a paragraph, word by word, so that it can be wrapped afterwards. Without colours the
// marks of bold text go; code keeps its backquotes.
func (t *textWriter) inline(s string) string {
	each := func(text string, style lipgloss.Style) string {
		words := strings.Fields(text)
		for i := range words {
			words[i] = style.Render(words[i])
		}
		return strings.Join(words, " ")
	}
	s = link.ReplaceAllString(s, "$1 ($2)")
	s = strong.ReplaceAllStringFunc(s, func(m string) string {
		return each(strings.Trim(m, "*"), t.r.NewStyle().Bold(true))
	})
	return code.ReplaceAllStringFunc(s, func(m string) string {
		return each(m, t.r.NewStyle().Foreground(lipgloss.Color("6")))
	})
}
