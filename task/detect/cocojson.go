package detect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
)

// COCODataset is a file of labelled objects in COCO's format. Keys of the file that have no field here are kept in
// Extra and written again.
type COCODataset struct {
	Images      []COCOImage
	Annotations []COCOAnnotation
	Categories  []COCOCategory
	Extra       map[string]json.RawMessage // "info", "licenses", ...
}

// COCOImage is an entry of "images".
type COCOImage struct {
	ID            int
	FileName      string
	Width, Height int // pixels; 0 when the file does not say
	Extra         map[string]json.RawMessage
}

// COCOAnnotation is an entry of "annotations": one object.
type COCOAnnotation struct {
	ID, ImageID, CategoryID int
	Box                     Rect
	Area                    float64 // square pixels; that of the box when the file does not say
	Crowd                   bool
	Extra                   map[string]json.RawMessage // "segmentation", ...
}

// COCOCategory is an entry of "categories".
type COCOCategory struct {
	ID    int
	Name  string
	Extra map[string]json.RawMessage
}

// COCODetection is an entry of a COCO results file.
type COCODetection struct {
	ImageID, CategoryID int
	Box                 Rect
	Score               float64
	Extra               map[string]json.RawMessage // "segmentation", "id", ...
}

// ReadCOCODetections reads a COCO results file: a list of {image_id, category_id, bbox: [x, y, width, height], score}.
// Ids are kept as they are, whatever they mean. It refuses, with the entry and the field, entries without one of
// these, negative sizes, and values that are not finite. It reads entry by entry and stops at the first mistake.
func ReadCOCODetections(r io.Reader) ([]COCODetection, error) {
	d := newCOCODecoder(r)
	if err := d.delim('[', "the file"); err != nil {
		if errors.Is(err, errNotArray) {
			return nil, fmt.Errorf("detect: the file is not a list of detections (COCO results are [{image_id, category_id, bbox, score}, ...])")
		}
		return nil, err
	}
	dets := []COCODetection{}
	err := d.elements("detections", func(i int, raw json.RawMessage) error {
		var x struct {
			ImageID    *int     `json:"image_id"`
			CategoryID *int     `json:"category_id"`
			Box        *quad    `json:"bbox"`
			Score      *float64 `json:"score"`
		}
		extra, err := decodeObject(raw, &x, "image_id", "category_id", "bbox", "score")
		if err != nil {
			return err
		}
		switch {
		case x.ImageID == nil:
			return errMissing("image_id")
		case x.CategoryID == nil:
			return errMissing("category_id")
		case x.Box == nil:
			return errMissing("bbox")
		case x.Score == nil:
			return errMissing("score")
		}
		det := COCODetection{ImageID: *x.ImageID, CategoryID: *x.CategoryID, Box: x.Box.rect(), Score: *x.Score, Extra: extra}
		if err := det.Box.check(); err != nil {
			return fmt.Errorf("bbox: %w", err)
		}
		dets = append(dets, det)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return dets, d.end()
}

// ReadCOCODetectionsFile is ReadCOCODetections on a file; errors name it.
func ReadCOCODetectionsFile(path string) ([]COCODetection, error) {
	return readFile(path, ReadCOCODetections)
}

// ReadCOCO reads a file of labelled objects: an object with the lists "images", "annotations" and "categories". It
// refuses ids that occur twice, annotations of unknown images or categories, and boxes and areas that are negative or
// not finite.
func ReadCOCO(r io.Reader) (*COCODataset, error) {
	d := newCOCODecoder(r)
	if err := d.delim('{', "the file"); err != nil {
		return nil, err
	}
	set := &COCODataset{}
	seen := map[string]bool{}
	for d.dec.More() {
		t, err := d.dec.Token()
		if err != nil {
			return nil, d.wrap(err)
		}
		key, _ := t.(string)
		if seen[key] {
			return nil, fmt.Errorf("detect: %q is there twice", key)
		}
		seen[key] = true
		switch key {
		case "images":
			err = d.list(key, set.image)
		case "annotations":
			err = d.list(key, set.annotation)
		case "categories":
			err = d.list(key, set.category)
		default:
			var raw json.RawMessage
			if err = d.wrap(d.dec.Decode(&raw)); err == nil {
				if set.Extra == nil {
					set.Extra = map[string]json.RawMessage{}
				}
				set.Extra[key] = raw
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if _, err := d.dec.Token(); err != nil {
		return nil, d.wrap(err)
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	for _, key := range []string{"images", "annotations", "categories"} {
		if !seen[key] {
			return nil, fmt.Errorf("detect: the file has no list %q; a COCO file has images, annotations and categories", key)
		}
	}
	return set, set.check()
}

// ReadCOCOFile is ReadCOCO on a file; errors name it.
func ReadCOCOFile(path string) (*COCODataset, error) { return readFile(path, ReadCOCO) }

func readFile[T any](path string, read func(io.Reader) (T, error)) (T, error) {
	var none T
	f, err := os.Open(path)
	if err != nil {
		return none, fmt.Errorf("detect: %w", err)
	}
	defer f.Close()
	v, err := read(f)
	if err != nil {
		return none, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

func (s *COCODataset) image(_ int, raw json.RawMessage) error {
	var x struct {
		ID       *int   `json:"id"`
		FileName string `json:"file_name"`
		Width    int    `json:"width"`
		Height   int    `json:"height"`
	}
	extra, err := decodeObject(raw, &x, "id", "file_name", "width", "height")
	switch {
	case err != nil:
		return err
	case x.ID == nil:
		return errMissing("id")
	case x.Width < 0 || x.Height < 0:
		return fmt.Errorf("width %d and height %d must not be negative", x.Width, x.Height)
	}
	s.Images = append(s.Images, COCOImage{*x.ID, x.FileName, x.Width, x.Height, extra})
	return nil
}

func (s *COCODataset) category(_ int, raw json.RawMessage) error {
	var x struct {
		ID   *int   `json:"id"`
		Name string `json:"name"`
	}
	extra, err := decodeObject(raw, &x, "id", "name")
	switch {
	case err != nil:
		return err
	case x.ID == nil:
		return errMissing("id")
	}
	s.Categories = append(s.Categories, COCOCategory{*x.ID, x.Name, extra})
	return nil
}

func (s *COCODataset) annotation(_ int, raw json.RawMessage) error {
	var x struct {
		ID         *int     `json:"id"`
		ImageID    *int     `json:"image_id"`
		CategoryID *int     `json:"category_id"`
		Box        *quad    `json:"bbox"`
		Area       *float64 `json:"area"`
		Crowd      flag     `json:"iscrowd"`
	}
	extra, err := decodeObject(raw, &x, "id", "image_id", "category_id", "bbox", "area", "iscrowd")
	switch {
	case err != nil:
		return err
	case x.ID == nil:
		return errMissing("id")
	case x.ImageID == nil:
		return errMissing("image_id")
	case x.CategoryID == nil:
		return errMissing("category_id")
	case x.Box == nil:
		return errMissing("bbox")
	}
	a := COCOAnnotation{ID: *x.ID, ImageID: *x.ImageID, CategoryID: *x.CategoryID, Box: x.Box.rect(), Crowd: bool(x.Crowd), Extra: extra}
	if err := a.Box.check(); err != nil {
		return fmt.Errorf("bbox: %w", err)
	}
	a.Area = a.Box.Area()
	if x.Area != nil {
		if a.Area = *x.Area; a.Area < 0 {
			return fmt.Errorf("area is %g; it must not be negative", a.Area)
		}
	}
	s.Annotations = append(s.Annotations, a)
	return nil
}

// check refuses repeated and dangling ids.
func (s *COCODataset) check() error {
	images, err := places("images", len(s.Images), func(i int) int { return s.Images[i].ID })
	if err != nil {
		return err
	}
	categories, err := places("categories", len(s.Categories), func(i int) int { return s.Categories[i].ID })
	if err != nil {
		return err
	}
	if _, err := places("annotations", len(s.Annotations), func(i int) int { return s.Annotations[i].ID }); err != nil {
		return err
	}
	for i, a := range s.Annotations {
		if _, ok := images[a.ImageID]; !ok {
			return fmt.Errorf("detect: annotations[%d]: there is no image with the id %d", i, a.ImageID)
		}
		if _, ok := categories[a.CategoryID]; !ok {
			return fmt.Errorf("detect: annotations[%d]: there is no category with the id %d", i, a.CategoryID)
		}
	}
	return nil
}

// places maps ids to where they are, and refuses an id that is there twice.
func places(what string, n int, id func(i int) int) (map[int]int, error) {
	at := make(map[int]int, n)
	for i := range n {
		if j, ok := at[id(i)]; ok {
			return nil, fmt.Errorf("detect: %s[%d] and %s[%d] have the same id %d", what, j, what, i, id(i))
		}
		at[id(i)] = i
	}
	return at, nil
}

// Match turns ids into the dense ones that EvaluateCOCO takes: images and classes by their place in the data set. It
// refuses detections of images or categories that the data set does not have. Index of a detection is its place in dets.
func (s *COCODataset) Match(dets []COCODetection) ([]GroundTruth, []Detection, COCOConfig, error) {
	cfg := COCOConfig{Images: len(s.Images), Classes: len(s.Categories)}
	if err := s.check(); err != nil {
		return nil, nil, cfg, err
	}
	images, _ := places("images", len(s.Images), func(i int) int { return s.Images[i].ID })
	categories, _ := places("categories", len(s.Categories), func(i int) int { return s.Categories[i].ID })
	gt := make([]GroundTruth, len(s.Annotations))
	for i, a := range s.Annotations {
		gt[i] = GroundTruth{ID: a.ID, Image: images[a.ImageID], Class: categories[a.CategoryID], Box: a.Box, Area: a.Area, Crowd: a.Crowd}
		if a.Area == 0 {
			gt[i].Area = Zero // 0 would take the box's
		}
	}
	dt := make([]Detection, len(dets))
	for i, d := range dets {
		image, ok := images[d.ImageID]
		if !ok {
			return nil, nil, cfg, fmt.Errorf("detect: detections[%d]: the ground truth has no image with the id %d", i, d.ImageID)
		}
		class, ok := categories[d.CategoryID]
		if !ok {
			return nil, nil, cfg, fmt.Errorf("detect: detections[%d]: the ground truth has no category with the id %d", i, d.CategoryID)
		}
		dt[i] = Detection{Image: image, Class: class, Box: d.Box, Score: d.Score, Index: i}
	}
	return gt, dt, cfg, nil
}

// SuppressCOCO is Suppress on the entries of a COCO results file: images in the order of their first entry, the best
// detection first, everything but the score kept as it was.
func SuppressCOCO(dets []COCODetection, cfg SoftNMSConfig) ([]COCODetection, error) {
	in := make([]Detection, len(dets))
	for i, d := range dets {
		in[i] = Detection{Image: d.ImageID, Class: d.CategoryID, Box: d.Box, Score: d.Score}
	}
	kept, err := Suppress(in, cfg)
	if err != nil {
		return nil, err
	}
	out := make([]COCODetection, len(kept))
	for i, k := range kept {
		out[i] = dets[k.Index]
		out[i].Score = k.Score
	}
	return out, nil
}

// WriteCOCODetections writes a COCO results file, an entry a line. Numbers are written so that reading them gives the
// same value again.
func WriteCOCODetections(w io.Writer, dets []COCODetection) error {
	return writeList(w, "", dets, func(b []byte, d COCODetection) ([]byte, error) {
		if err := finite(d.Box.X, d.Box.Y, d.Box.W, d.Box.H, d.Score); err != nil {
			return nil, err
		}
		b = fmt.Appendf(b, `{"image_id":%d,"category_id":%d,"bbox":`, d.ImageID, d.CategoryID)
		b = appendBox(b, d.Box)
		b = append(b, `,"score":`...)
		b = appendNumber(b, d.Score)
		return appendExtra(b, d.Extra)
	})
}

// WriteCOCO writes a data set in COCO's format.
func WriteCOCO(w io.Writer, s *COCODataset) error {
	if _, err := io.WriteString(w, "{\"images\":"); err != nil {
		return err
	}
	err := writeList(w, "", s.Images, func(b []byte, x COCOImage) ([]byte, error) {
		b = fmt.Appendf(b, `{"id":%d,"file_name":%s`, x.ID, text(x.FileName))
		if x.Width > 0 || x.Height > 0 {
			b = fmt.Appendf(b, `,"width":%d,"height":%d`, x.Width, x.Height)
		}
		return appendExtra(b, x.Extra)
	})
	if err != nil {
		return err
	}
	err = writeList(w, ",\"annotations\":", s.Annotations, func(b []byte, x COCOAnnotation) ([]byte, error) {
		if err := finite(x.Box.X, x.Box.Y, x.Box.W, x.Box.H, x.Area); err != nil {
			return nil, err
		}
		b = fmt.Appendf(b, `{"id":%d,"image_id":%d,"category_id":%d,"bbox":`, x.ID, x.ImageID, x.CategoryID)
		b = appendBox(b, x.Box)
		b = append(b, `,"area":`...)
		b = appendNumber(b, x.Area)
		crowd := 0
		if x.Crowd {
			crowd = 1
		}
		b = fmt.Appendf(b, `,"iscrowd":%d`, crowd)
		return appendExtra(b, x.Extra)
	})
	if err != nil {
		return err
	}
	err = writeList(w, ",\"categories\":", s.Categories, func(b []byte, x COCOCategory) ([]byte, error) {
		return appendExtra(fmt.Appendf(b, `{"id":%d,"name":%s`, x.ID, text(x.Name)), x.Extra)
	})
	if err != nil {
		return err
	}
	b, err := appendExtra(nil, s.Extra)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// writeList writes prefix and then a list, an entry a line.
func writeList[T any](w io.Writer, prefix string, list []T, entry func(b []byte, x T) ([]byte, error)) error {
	b := append([]byte(prefix), '[')
	for i, x := range list {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = entry(append(b, '\n'), x); err != nil {
			return fmt.Errorf("detect: entry %d: %w", i, err)
		}
		if len(b) > 1<<15 {
			if _, err := w.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
	}
	_, err := w.Write(append(b, "\n]"...))
	return err
}

func finite(v ...float64) error {
	for _, x := range v {
		if math.IsNaN(x) || math.IsInf(x, 0) {
			return fmt.Errorf("%g cannot be written as JSON", x)
		}
	}
	return nil
}

func appendNumber(b []byte, v float64) []byte { return strconv.AppendFloat(b, v, 'g', -1, 64) }

func appendBox(b []byte, r Rect) []byte {
	for i, v := range [4]float64{r.X, r.Y, r.W, r.H} {
		b = appendNumber(append(b, "[,,,"[i]), v)
	}
	return append(b, ']')
}

// appendExtra adds the unknown fields, in the order of their names, and closes the object.
func appendExtra(b []byte, extra map[string]json.RawMessage) ([]byte, error) {
	for _, k := range slices.Sorted(maps.Keys(extra)) {
		v := extra[k]
		if !json.Valid(v) {
			return nil, fmt.Errorf("field %q holds no JSON", k)
		}
		b = append(append(append(append(b, ','), text(k)...), ':'), v...)
	}
	return append(b, '}'), nil
}

func text(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil { // cannot happen: every string can be written
		return []byte(`""`)
	}
	return b
}

// quad is a list of exactly four numbers.
type quad [4]float64

func (q *quad) rect() Rect { return Rect{q[0], q[1], q[2], q[3]} }

// UnmarshalJSON reads [x, y, width, height].
func (q *quad) UnmarshalJSON(b []byte) error {
	s := strings.TrimSpace(string(b))
	bad := func() error { return fmt.Errorf("bbox is %s; want [x, y, width, height]", shorten(b)) }
	if len(s) < 2 || s[0] != '[' {
		return bad()
	}
	parts := strings.SplitN(s[1:len(s)-1], ",", 5)
	if len(parts) != 4 {
		return bad()
	}
	for i, p := range parts {
		var n json.Number
		if err := json.Unmarshal([]byte(p), &n); err != nil || n == "" || strings.Contains(p, `"`) {
			return bad()
		}
		v, err := n.Float64()
		if err != nil {
			return bad()
		}
		q[i] = v
	}
	return nil
}

// flag is 0, 1, false or true.
type flag bool

// UnmarshalJSON reads it.
func (f *flag) UnmarshalJSON(b []byte) error {
	switch strings.TrimSpace(string(b)) {
	case "0", "false":
		*f = false
	case "1", "true":
		*f = true
	default:
		return fmt.Errorf("iscrowd is %s; want 0 or 1", shorten(b))
	}
	return nil
}

func shorten(b []byte) string {
	if len(b) > 40 {
		return string(b[:40]) + "..."
	}
	return string(b)
}

func errMissing(field string) error { return fmt.Errorf("has no field %q", field) }

// decodeObject reads the known fields into x and returns the others.
func decodeObject(raw json.RawMessage, x any, known ...string) (extra map[string]json.RawMessage, err error) {
	if t := bytes.TrimLeft(raw, " \t\r\n"); len(t) == 0 || t[0] != '{' {
		return nil, fmt.Errorf("is %s; want an object {...}", shorten(raw))
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err = dec.Decode(x); err == nil {
		return nil, nil
	}
	if err := json.Unmarshal(raw, x); err != nil {
		return nil, fieldError(err)
	}
	if err := json.Unmarshal(raw, &extra); err != nil {
		return nil, fieldError(err)
	}
	for _, k := range known {
		maps.DeleteFunc(extra, func(name string, _ json.RawMessage) bool { return strings.EqualFold(name, k) })
	}
	if len(extra) == 0 {
		return nil, nil
	}
	return extra, nil
}

func fieldError(err error) error {
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) && typ.Field != "" {
		return fmt.Errorf("field %q is a %s; want %s", typ.Field, typ.Value, kind(typ.Type.Kind().String()))
	}
	return err
}

func kind(k string) string {
	switch {
	case strings.HasPrefix(k, "int"):
		return "a whole number"
	case strings.HasPrefix(k, "float"):
		return "a number"
	}
	return "a " + k
}

// cocoDecoder reads a file token by token, so that nothing is allocated for what turns out to be wrong.
type cocoDecoder struct{ dec *json.Decoder }

var errNotArray = errors.New("not a list")

func newCOCODecoder(r io.Reader) cocoDecoder { return cocoDecoder{json.NewDecoder(r)} }

func (d cocoDecoder) wrap(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), strings.Contains(err.Error(), "unexpected end of JSON"):
		return fmt.Errorf("detect: the file ends too early, after %d bytes: %w", d.dec.InputOffset(), io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("detect: not JSON near byte %d: %w", d.dec.InputOffset(), err)
}

func (d cocoDecoder) delim(want json.Delim, what string) error {
	t, err := d.dec.Token()
	if err != nil {
		return d.wrap(err)
	}
	if t != want {
		return fmt.Errorf("detect: %s begins with %.40v; want %v: %w", what, t, want, errNotArray)
	}
	return nil
}

// list reads a list whose opening bracket is still to come.
func (d cocoDecoder) list(what string, entry func(i int, raw json.RawMessage) error) error {
	if err := d.delim('[', fmt.Sprintf("%q", what)); err != nil {
		return err
	}
	return d.elements(what, entry)
}

// elements reads entries up to and with the closing bracket.
func (d cocoDecoder) elements(what string, entry func(i int, raw json.RawMessage) error) error {
	var raw json.RawMessage
	for i := 0; d.dec.More(); i++ {
		raw = raw[:0]
		if err := d.dec.Decode(&raw); err != nil {
			return d.wrap(fmt.Errorf("%s[%d]: %w", what, i, err))
		}
		if err := entry(i, raw); err != nil {
			return fmt.Errorf("detect: %s[%d] (ends at byte %d) %w", what, i, d.dec.InputOffset(), err)
		}
	}
	if _, err := d.dec.Token(); err != nil {
		return d.wrap(err)
	}
	return nil
}

// end refuses what follows the value.
func (d cocoDecoder) end() error {
	if _, err := d.dec.Token(); err != io.EOF {
		return fmt.Errorf("detect: more follows after the value, at byte %d", d.dec.InputOffset())
	}
	return nil
}
