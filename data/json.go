package data

import (
	"encoding/json"
	"errors"
	"io"
	"os"
)

// DefaultJSONBytes is the limit that DecodeJSON uses for a limit of 0: 256 MiB.
const DefaultJSONBytes = 256 << 20

// DecodeJSON reads one JSON value of at most limit bytes (0: DefaultJSONBytes) into v. Text after the value, and a
// value of another type than v has, are errors that name the field or the position.
func DecodeJSON(r io.Reader, limit int64, v any) error {
	if limit <= 0 {
		limit = DefaultJSONBytes
	}
	if n := remaining(r); n > limit {
		return badf("json", "", "%d bytes are %w: more than %d", n, ErrTooLarge, limit)
	}
	lr := &io.LimitedReader{R: r, N: limit + 1}
	d := json.NewDecoder(lr)
	err := d.Decode(v)
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			err = nil
		} else if err == nil {
			return badf("json", "", "more follows after the value, at byte %d", d.InputOffset())
		}
	}
	if lr.N <= 0 {
		return badf("json", "", "%w: more than %d bytes", ErrTooLarge, limit)
	}
	var syntax *json.SyntaxError
	var typ *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &syntax):
		return badf("json", "", "%w at byte %d", err, syntax.Offset)
	case errors.As(err, &typ):
		return badf("json", typ.Field, "%s at byte %d where %s belongs", typ.Value, typ.Offset, typ.Type)
	case err == io.EOF:
		return badf("json", "", "nothing is there: %w", io.ErrUnexpectedEOF)
	default:
		return badf("json", "", "%w", err)
	}
}

// DecodeJSONFile reads a JSON file of at most DefaultJSONBytes.
func DecodeJSONFile(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return inFile(path, DecodeJSON(f, 0, v))
}
