//! Compression of one chunk at a time.
#![cfg_attr(
    not(all(feature = "lz4", feature = "zstd")),
    allow(
        unused_variables,
        unreachable_code,
        reason = "each codec is behind a feature"
    )
)]

use super::header::Codec;
use super::info::Compression;
use crate::FileOffset;
use crate::checkpoint::CheckpointError;

/// Compresses chunks; one a thread.
pub(crate) struct Compressor {
    kind: Kind,
}

enum Kind {
    None,
    #[cfg(feature = "lz4")]
    Lz4(Box<lz4_flex::block::CompressTable>),
    #[cfg(feature = "zstd")]
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Compressor {
    pub(crate) fn new(compression: Compression) -> Result<Self, CheckpointError> {
        let kind = match compression {
            Compression::None => Kind::None,
            #[cfg(feature = "lz4")]
            Compression::Lz4 => Kind::Lz4(Box::default()),
            #[cfg(feature = "zstd")]
            Compression::Zstd { level } => Kind::Zstd(Box::new(
                zstd::bulk::Compressor::new(level).map_err(compress)?,
            )),
            #[allow(unreachable_patterns, reason = "reached without the features")]
            other => {
                return Err(CheckpointError::CodecMissing {
                    codec: other.name(),
                });
            }
        };
        Ok(Self { kind })
    }

    /// Whether there is any use in trying.
    pub(crate) const fn compresses(&self) -> bool {
        !matches!(self.kind, Kind::None)
    }

    /// The most that `len` bytes can become, in bytes.
    pub(crate) fn bound(&self, len: usize) -> usize {
        match &self.kind {
            Kind::None => len,
            #[cfg(feature = "lz4")]
            Kind::Lz4(_) => lz4_flex::block::get_maximum_output_size(len),
            #[cfg(feature = "zstd")]
            Kind::Zstd(_) => zstd::zstd_safe::compress_bound(len),
        }
    }

    /// Compresses `input` into `out`, which has room for [`bound`](Self::bound) bytes. Returns
    /// how many it became; `None` if that is no fewer.
    pub(crate) fn compress(
        &mut self,
        input: &[u8],
        out: &mut [u8],
    ) -> Result<Option<usize>, CheckpointError> {
        let len: usize = match &mut self.kind {
            Kind::None => return Ok(None),
            #[cfg(feature = "lz4")]
            Kind::Lz4(table) => {
                lz4_flex::block::compress_into_with_table(input, out, table).map_err(compress)?
            }
            #[cfg(feature = "zstd")]
            Kind::Zstd(zstd) => zstd.compress_to_buffer(input, out).map_err(compress)?,
        };
        Ok((len < input.len()).then_some(len))
    }
}

#[allow(dead_code, reason = "needed with a feature")]
fn compress(source: impl std::error::Error + Send + Sync + 'static) -> CheckpointError {
    CheckpointError::Compress {
        source: Box::new(source),
    }
}

/// Decompresses chunks; one a thread.
pub(crate) struct Decompressor {
    codec: Codec,
    #[cfg(feature = "zstd")]
    zstd: Option<Box<zstd::bulk::Decompressor<'static>>>,
}

impl Decompressor {
    pub(crate) fn new(codec: Codec) -> Self {
        Self {
            codec,
            #[cfg(feature = "zstd")]
            zstd: None,
        }
    }

    /// Decompresses `input`, which stands at `offset` in the file, to exactly fill `out`.
    pub(crate) fn decompress(
        &mut self,
        input: &[u8],
        out: &mut [u8],
        offset: FileOffset,
    ) -> Result<(), CheckpointError> {
        let bad = |source: Box<dyn std::error::Error + Send + Sync>| CheckpointError::Decompress {
            offset,
            source,
        };
        let len: usize = match self.codec {
            #[cfg(feature = "lz4")]
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(input, out).map_err(|e| bad(Box::new(e)))?
            }
            #[cfg(feature = "zstd")]
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(Box::new(
                        zstd::bulk::Decompressor::new().map_err(|e| bad(Box::new(e)))?,
                    )),
                };
                zstd.decompress_to_buffer(input, out)
                    .map_err(|e| bad(Box::new(e)))?
            }
            other => {
                return Err(CheckpointError::CodecMissing {
                    codec: other.name(),
                });
            }
        };
        if len == out.len() {
            Ok(())
        } else {
            Err(bad(
                format!("{len} bytes came out, not {}", out.len()).into()
            ))
        }
    }
}
