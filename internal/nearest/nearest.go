// Package nearest finds the name that was probably meant.
package nearest

import "strings"

// Match returns the candidate closest to name, when one is close enough to be a slip of the keyboard: within a third of
// its length in edits, or one a prefix of at least three letters of the other, letter case aside. The first wins a tie.
func Match(name string, candidates []string) (string, bool) {
	name = strings.ToLower(name)
	best, bestDist := "", -1
	for _, c := range candidates {
		lower := strings.ToLower(c)
		d := Distance(name, lower)
		limit := max(1, max(len(name), len(lower))/3)
		if len(name) >= 3 && (strings.HasPrefix(lower, name) || strings.HasSuffix(lower, name) || strings.HasPrefix(name, lower) && len(lower) >= 3) {
			d = min(d, limit)
		}
		if d <= limit && (bestDist < 0 || d < bestDist) {
			best, bestDist = c, d
		}
	}
	return best, bestDist >= 0
}

// Distance is the number of insertions, deletions, substitutions and swaps of neighbours that turn a into b (optimal
// string alignment).
func Distance(a, b string) int {
	s, t := []rune(a), []rune(b)
	prev2 := make([]int, len(t)+1)
	prev := make([]int, len(t)+1)
	cur := make([]int, len(t)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(s); i++ {
		cur[0] = i
		for j := 1; j <= len(t); j++ {
			cost := 1
			if s[i-1] == t[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && s[i-1] == t[j-2] && s[i-2] == t[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(t)]
}
