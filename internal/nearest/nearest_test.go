package nearest

import "testing"

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"soft-nms", "soft-nms", 0}, {"sfot-nms", "soft-nms", 1}, {"softnms", "soft-nms", 1}, {"kitten", "sitting", 3}} {
		if got := Distance(c.a, c.b); got != c.want {
			t.Errorf("Distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestMatch(t *testing.T) {
	names := []string{"layernorm", "repq-vit", "soft-nms", "data-pruning", "espcn"}
	for in, want := range map[string]string{
		"softnms": "soft-nms", "Soft-NMS": "soft-nms", "repq": "repq-vit", "pruning": "data-pruning", "layer-norm": "layernorm",
		"espnc": "espcn", "nms": "soft-nms", "quantum": "", "x": "", "": "",
	} {
		got, ok := Match(in, names)
		if got != want || ok != (want != "") {
			t.Errorf("Match(%q) = %q, %v; want %q", in, got, ok, want)
		}
	}
}
