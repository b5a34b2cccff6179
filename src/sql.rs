//! SQL text as far as a client must understand it: tokens, and where a statement ends.

/// One statement of a simple query.
#[derive(Debug)]
pub(crate) struct SqlStatement<'a> {
    /// Where it begins in the query.
    #[allow(dead_code, reason = "only the test kit looks at it")]
    pub(crate) start: usize,
    #[allow(dead_code, reason = "only the test kit looks at it")]
    pub(crate) text: &'a str,
    pub(crate) tokens: Vec<Token<'a>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token<'a> {
    Word(&'a str),
    /// A quoted identifier, without its quotes; doubled quotes stay double.
    Quoted(&'a str),
    /// A string, without its quotes; as it is written.
    Text(&'a str),
    Symbol(u8),
}

impl Token<'_> {
    pub(crate) fn is(&self, word: &str) -> bool {
        matches!(self, Self::Word(w) if w.eq_ignore_ascii_case(word))
    }
}

impl SqlStatement<'_> {
    /// Whether the token in this place is this word.
    pub(crate) fn word(&self, index: usize, word: &str) -> bool {
        self.tokens.get(index).is_some_and(|token| token.is(word))
    }
}

/// The statements of a simple query, without those that are empty.
///
/// Strings are read as `standard_conforming_strings` has them by default. The bodies of SQL functions (`BEGIN ATOMIC`)
/// are told as psql does it.
pub(crate) fn split(sql: &str) -> Vec<SqlStatement<'_>> {
    let mut statements = Vec::new();
    let mut tokens: Vec<Token<'_>> = Vec::new();
    let (mut start, mut end) = (0, 0);
    let (mut parentheses, mut begins) = (0u32, 0u32);
    let mut scanner = Scanner { sql, at: 0 };
    while let Some((at, token)) = scanner.next() {
        if tokens.is_empty() {
            start = at;
        }
        match &token {
            Token::Symbol(b'(') => parentheses += 1,
            Token::Symbol(b')') => parentheses = parentheses.saturating_sub(1),
            Token::Symbol(b';') if parentheses == 0 && begins == 0 => {
                if !tokens.is_empty() {
                    let tokens = std::mem::take(&mut tokens);
                    statements.push(SqlStatement { start, text: &sql[start..end], tokens });
                }
                continue;
            }
            word if parentheses == 0 && makes_routine(&tokens) => {
                // A routine may itself be called "begin".
                let body = word.is("atomic") && tokens.last().is_some_and(|last| last.is("begin"));
                if body || word.is("case") && begins > 0 {
                    begins += 1;
                } else if word.is("end") {
                    begins = begins.saturating_sub(1);
                }
            }
            _ => {}
        }
        tokens.push(token);
        end = scanner.at;
    }
    if !tokens.is_empty() {
        statements.push(SqlStatement { start, text: &sql[start..end], tokens });
    }
    statements
}

fn makes_routine(tokens: &[Token<'_>]) -> bool {
    let routine =
        |token: Option<&Token<'_>>| token.is_some_and(|token| token.is("function") || token.is("procedure"));
    tokens.first().is_some_and(|token| token.is("create"))
        && (routine(tokens.get(1)) || tokens.get(1).is_some_and(|t| t.is("or")) && routine(tokens.get(3)))
}

struct Scanner<'a> {
    sql: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn rest(&self) -> &'a [u8] {
        &self.sql.as_bytes()[self.at..]
    }

    /// The next token and where it begins; `at` is then behind it.
    fn next(&mut self) -> Option<(usize, Token<'a>)> {
        self.skip_blank();
        let start = self.at;
        let rest = self.rest();
        let token = match *rest.first()? {
            b'\'' => Token::Text(self.quoted(b'\'', false)),
            b'e' | b'E' if rest.get(1) == Some(&b'\'') => {
                self.at += 1;
                Token::Text(self.quoted(b'\'', true))
            }
            b'"' => Token::Quoted(self.quoted(b'"', false)),
            b'$' => match self.dollar_quoted() {
                Some(text) => Token::Text(text),
                None => {
                    self.at += 1;
                    Token::Symbol(b'$')
                }
            },
            byte if is_word(byte) => {
                // A number too: nothing here looks at one.
                let length = rest.iter().take_while(|b| is_word(**b) || **b == b'$').count();
                self.at += length;
                Token::Word(&self.sql[start..self.at])
            }
            byte => {
                self.at += 1;
                Token::Symbol(byte)
            }
        };
        Some((start, token))
    }

    fn skip_blank(&mut self) {
        loop {
            match self.rest() {
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, ..] => self.at += 1,
                [b'-', b'-', ..] => {
                    let length = self.rest().iter().position(|b| matches!(b, b'\n' | b'\r'));
                    self.at += length.unwrap_or(self.rest().len());
                }
                [b'/', b'*', ..] => self.skip_comment(),
                _ => return,
            }
        }
    }

    fn skip_comment(&mut self) {
        let mut depth = 0;
        loop {
            match self.rest() {
                [] => return,
                [b'/', b'*', ..] => {
                    depth += 1;
                    self.at += 2;
                }
                [b'*', b'/', ..] => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        return;
                    }
                }
                _ => self.at += 1,
            }
        }
    }

    /// What stands between quotes; a doubled quote does not end it. Without an end it goes on to the end of the text.
    fn quoted(&mut self, quote: u8, escapes: bool) -> &'a str {
        self.at += 1;
        let start = self.at;
        loop {
            match self.rest() {
                [] => return &self.sql[start..],
                [b'\\', _, ..] if escapes => self.at += 2,
                [a, b, ..] if *a == quote && *b == quote => self.at += 2,
                [a, ..] if *a == quote => {
                    let end = self.at;
                    self.at += 1;
                    // With a newline in between, a string goes on, and has its escapes there too (manual, chapter 4.1.2).
                    if escapes && self.goes_on() {
                        continue;
                    }
                    return &self.sql[start..end];
                }
                _ => self.at += 1,
            }
        }
    }

    /// Whether another part of a string follows; `at` is then in it.
    fn goes_on(&mut self) -> bool {
        let before = self.at;
        self.skip_blank();
        let goes_on = self.sql[before..self.at].contains(['\n', '\r']) && self.rest().first() == Some(&b'\'');
        self.at = if goes_on { self.at + 1 } else { before };
        goes_on
    }

    fn dollar_quoted(&mut self) -> Option<&'a str> {
        let rest = &self.sql[self.at..];
        let tag = &rest[1..];
        let length = tag.bytes().take_while(|b| is_word(*b)).count();
        if tag.as_bytes().get(length) != Some(&b'$') || tag.as_bytes()[0].is_ascii_digit() {
            return None;
        }
        let (tag, body) = rest.split_at(length + 2);
        let end = body.find(tag);
        self.at += tag.len() + end.map_or(body.len(), |end| end + tag.len());
        Some(&body[..end.unwrap_or(body.len())])
    }
}

/// Letters, digits, `_` and everything beyond ASCII (manual, chapter 4.1.1).
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}
