//! A client that speaks the protocol by hand, and what it says.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::frames::{Frames, message, untagged};
use super::{Database, within};

/// The tag and the body of a message, of either side.
pub type Message = (u8, Vec<u8>);

/// A client that speaks the protocol by hand, where the driver would choose for itself.
pub struct Raw {
    stream: tokio::net::TcpStream,
    frames: Frames,
}

impl Raw {
    pub async fn connect(url: &str, database: &Database) -> Self {
        let address = url.split(['@', '/']).nth(3).expect("an address");
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("a socket");
        // Version 3.0.
        let mut opening = 196_608i32.to_be_bytes().to_vec();
        opening.extend(format!("user\0postgres\0database\0{}\0\0", database.database.name()).bytes());
        stream.write_all(&untagged(&opening)).await.unwrap();
        let mut raw = Self { stream, frames: Frames::default() };
        raw.until(b'Z').await;
        raw
    }

    pub async fn send(&mut self, messages: &[(u8, &[u8])]) {
        for (tag, body) in messages {
            self.stream.write_all(&message(*tag, body)).await.unwrap();
        }
    }

    async fn next(&mut self) -> std::io::Result<Message> {
        let mut chunk = [0; 16384];
        loop {
            if let Some(frame) = self.frames.take() {
                return Ok((frame.tag(), frame.body().to_vec()));
            }
            match self.stream.read(&mut chunk).await? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                n => self.frames.feed(&chunk[..n]),
            }
        }
    }

    /// The tags and bodies up to one of this tag.
    pub async fn until(&mut self, last: u8) -> Vec<Message> {
        let mut frames = Vec::new();
        within(async {
            while frames.last().is_none_or(|(tag, _)| *tag != last) {
                frames.push(self.next().await.expect("an answer"));
            }
        })
        .await;
        frames
    }

    async fn send_batch(&mut self, parts: &[Vec<Message>]) {
        let messages: Vec<_> = parts.iter().flatten().map(|(tag, body)| (*tag, &body[..])).collect();
        self.send(&messages).await;
        self.send(&[(b'S', b"")]).await;
    }

    /// The answer to a batch, which ends in one Sync, in [`words`].
    pub async fn batch(&mut self, parts: &[Vec<Message>]) -> String {
        self.send_batch(parts).await;
        words(&self.until(b'Z').await)
    }

    /// The same of a batch in which the connection ends: what came before that.
    pub async fn last_words(&mut self, parts: &[Vec<Message>]) -> String {
        self.send_batch(parts).await;
        let mut frames = Vec::new();
        within(async {
            while let Ok(frame) = self.next().await {
                frames.push(frame);
            }
        })
        .await;
        words(&frames)
    }
}

/// The tags of frames, with those of commands, SQLSTATEs, and the status.
fn words(frames: &[Message]) -> String {
    let word = |(tag, body): &Message| match tag {
        b'C' => format!("[{}]", String::from_utf8_lossy(&body[..body.len() - 1])),
        b'E' | b'N' => {
            let fields = body.split(|b| *b == 0);
            let code = fields.filter_map(|field| field.strip_prefix(b"C")).next().expect("a SQLSTATE");
            format!("<{}{}>", char::from(*tag), String::from_utf8_lossy(code))
        }
        b'Z' => format!(" {}", char::from(body[0])),
        tag => char::from(*tag).to_string(),
    };
    frames.iter().map(word).collect()
}

pub fn tags(frames: &[Message]) -> String {
    frames.iter().map(|(tag, _)| char::from(*tag)).collect()
}

/// Parse, Bind and Execute of a statement without parameters, all unnamed.
pub fn run(sql: &str) -> Vec<Message> {
    vec![(b'P', format!("\0{sql}\0\0\0").into_bytes()), (b'B', vec![0; 8]), (b'E', vec![0; 5])]
}

/// The same, with a Describe as the driver sends it, and names of statement and portal.
pub fn run_named(statement: &str, portal: &str) -> Vec<Message> {
    vec![
        (b'B', format!("{portal}\0{statement}\0\0\0\0\0\0\0").into_bytes()),
        (b'D', format!("P{portal}\0").into_bytes()),
        (b'E', format!("{portal}\0\0\0\0\0").into_bytes()),
    ]
}

/// As pg-session sends a setting of a transaction.
pub fn set_config(name: &str, value: &str) -> Vec<Message> {
    let mut bind = b"\0\0\0\0\0\x02".to_vec();
    for text in [name, value] {
        bind.extend(i32::try_from(text.len()).expect("short").to_be_bytes());
        bind.extend(text.as_bytes());
    }
    bind.extend(b"\0\0");
    let parse = b"\0SELECT pg_catalog.set_config($1,$2,true)\0\0\x02\0\0\0\x19\0\0\0\x19".to_vec();
    vec![(b'P', parse), (b'B', bind), (b'E', vec![0; 5])]
}
